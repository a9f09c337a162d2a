echo "Linux $(uname -r) in Bivisor, with a busybox shell. \`poweroff\` ends the machine."
exec sh -i
