//! Bad input: an error that names the file and the fix, never a panic.
use super::*;
use std::path::Path;

fn error(kernel: &[u8], cmdline: &str) -> String {
    boot(&memory(16), kernel, None, &[], cmdline).unwrap_err().to_string()
}

#[test]
fn an_image_of_any_format_cut_at_any_length_never_panics() {
    let ram = memory(8);
    for (name, whole) in all_formats() {
        for length in 1..whole.len() {
            let result = boot(&ram, &whole[..length], None, &[], "");
            // A flat image without an end address may end anywhere behind its header.
            let loads = name.ends_with("flat") && length >= 32;
            // A bzImage's size is known to 16 bytes.
            let loads = loads || name.starts_with("bzImage") && length + 15 >= whole.len();
            assert!(loads || result.is_err(), "{name} cut at {length} was loaded");
        }
    }
}

#[test]
fn an_image_of_any_format_with_any_byte_changed_never_panics() {
    let ram = memory(4);
    for (_, whole) in all_formats() {
        for at in 0..whole.len().min(0x2a0) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = boot(&ram, &bytes, None, &[], "");
            }
        }
    }
}

#[test]
fn fields_at_their_extremes_never_panic() {
    let ram = memory(4);
    for (_, whole) in all_formats() {
        for at in (0..whole.len().min(0x2a0) - 8).step_by(2) {
            for value in [u64::MAX, u64::MAX >> 1, 1 << 63, 0xffff_f000] {
                for width in [4, 8] {
                    let mut bytes = whole.clone();
                    put(&mut bytes, at, &value.to_le_bytes()[..width]);
                    let _ = boot(&ram, &bytes, None, &[], "");
                }
            }
        }
    }
}

#[test]
fn a_missing_or_empty_kernel_or_a_directory_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| Image::open(&folder.path().join(name)).unwrap_err().to_string();
    assert!(open("vmlinuz").ends_with("vmlinuz: not found; check the path"));
    std::fs::write(folder.path().join("empty"), b"").unwrap();
    assert!(open("empty").ends_with("empty: is empty; fetch or build it again"));
    let error = Image::open(folder.path()).unwrap_err().to_string();
    assert!(error.ends_with("is a directory; give a file"), "{error}");
    assert!(Image::open(Path::new("/dev/null")).unwrap_err().to_string().contains("is empty"));
}

#[test]
fn a_file_loads_as_the_same_bytes_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmlinuz");
    std::fs::write(&path, bzimage(true)).unwrap();
    let (kernel, platform) = (Image::open(&path).unwrap(), Platform::default());
    let (from_file, from_bytes) = (memory(16), memory(16));
    let request = BootRequest {
        kernel: &kernel,
        initrd: None,
        modules: &[],
        cmdline: "",
        vcpus: 1,
        platform: &platform,
    };
    let entry = load(&from_file, &request).unwrap();
    assert_eq!(entry.state, boot(&from_bytes, &bzimage(true), None, &[], "").unwrap().state);
    assert_eq!(read(&from_file, 0, 16 << 20), read(&from_bytes, 0, 16 << 20));
    // Cut off after it was opened.
    std::fs::write(&path, &bzimage(true)[..3000]).unwrap();
    assert!(matches!(load(&from_file, &request).unwrap_err(), BootError::Read { .. }));
}

#[test]
fn a_file_of_another_kind_is_called_by_its_name() {
    let text = error(b"\x1f\x8b compressed", "");
    assert!(text.starts_with("kernel: not a kernel that can be booted here: it is compressed"));
    let text = error(&elf(true, 0x10_0000, &CODE, &[]), "");
    assert!(text.contains("an ELF file without a PVH note"), "{text}");
}

#[test]
fn a_command_line_over_the_kernels_limit_is_refused_and_one_at_the_limit_is_not() {
    boot(&memory(16), &bzimage(true), None, &[], &"x".repeat(2047)).unwrap();
    assert_eq!(
        error(&bzimage(true), &"x".repeat(2048)),
        "--cmdline: is 2048 bytes long, but kernel takes at most 2047; shorten it"
    );
    assert!(error(&bzimage(true), "a\0b").starts_with("--cmdline: contains a NUL byte"));
}

#[test]
fn too_little_memory_is_answered_with_how_much_is_needed() {
    let mut kernel = bzimage(true);
    put(&mut kernel, 0x260, &0x3000_0000u32.to_le_bytes());
    let text = error(&kernel, "");
    assert!(text.contains("needs at least 770MiB"), "{text}");
    let kernel = elf(true, 0x400_0000, &CODE, &pvh_notes(0x400_0000));
    assert!(error(&kernel, "").contains("needs at least 65MiB"));
    let text = boot(&memory(1), &bzimage(true), None, &[], "").unwrap_err().to_string();
    assert!(text.contains("needs at least 2MiB of memory, but the machine has 1MiB"), "{text}");
}

#[test]
fn an_initrd_that_does_not_fit_is_named_with_the_memory_that_it_needs() {
    let mut bytes = crate::initrd::tests::archive();
    bytes.resize(20 << 20, 0);
    let initrd = Image::from_bytes("initrd.img".into(), bytes).unwrap();
    let result = boot(&memory(16), &bzimage(true), Some(&initrd), &[], "");
    let text = result.unwrap_err().to_string();
    assert!(text.starts_with("initrd.img: needs at least 23MiB"), "{text}");
}

#[test]
fn a_file_that_more_memory_cannot_help_is_not_answered_with_more_memory() {
    // The kernel leaves 1 MiB above itself of 16, and 3 MiB are wanted.
    let mut kernel = bzimage(true);
    put(&mut kernel, 0x22c, &0x7f_ffffu32.to_le_bytes());
    put(&mut kernel, 0x260, &0x50_0000u32.to_le_bytes());
    let mut bytes = crate::initrd::tests::archive();
    bytes.resize(3 << 20, 0);
    let initrd = Image::from_bytes("initrd.img".into(), bytes).unwrap();
    let text = boot(&memory(16), &kernel, Some(&initrd), &[], "").unwrap_err().to_string();
    assert!(text.starts_with("initrd.img: does not fit, beside what is loaded"), "{text}");
}

#[test]
fn a_kernel_outside_of_ram_or_over_itself_is_refused() {
    let text = error(&elf(true, 0xa_0000, &CODE, &pvh_notes(0xa_0000)), "");
    assert!(text.contains("0xa0000 to 0xa1040, where this machine has no RAM"), "{text}");
    let text = error(&elf(true, u64::MAX - 8192, &CODE, &pvh_notes(0)), "");
    assert!(text.contains("no RAM"), "{text}");
    let mut twice = elf(true, 0x10_0000, &CODE, &pvh_notes(0x10_0000));
    let segment = twice[64..120].to_vec();
    put(&mut twice, 120, &segment);
    assert!(boot(&memory(16), &twice, None, &[], "").is_err());
}

#[test]
fn files_that_a_protocol_has_no_place_for_are_refused_with_the_right_flag() {
    let file = Image::from_bytes("file".into(), vec![1]).unwrap();
    let module =
        Module { image: Image::from_bytes("m".into(), vec![1]).unwrap(), arguments: "m".into() };
    let text = boot(&memory(16), &bzimage(true), None, &[module], "").unwrap_err().to_string();
    assert_eq!(text, "kernel: is a Linux kernel, which takes no modules; use --initrd");
    let kernel = elf(false, 0x10_0000, &headed(&multiboot1(0, &[])), &[]);
    let text = boot(&memory(16), &kernel, Some(&file), &[], "").unwrap_err().to_string();
    assert_eq!(text, "kernel: is a multiboot kernel, which takes no initrd; use --module");
}

#[test]
fn features_that_a_multiboot_header_requires_and_nobody_has_are_refused() {
    let one = |flags| elf(false, 0x10_0000, &headed(&multiboot1(flags, &[])), &[]);
    assert!(error(&one(4), "").contains("requires a video mode"));
    assert!(error(&one(1 << 9), "").contains("requires features 0x200"));
    let two = |tag| elf(false, 0x10_0000, &headed(&multiboot2(&[tag])), &[]);
    assert!(error(&two((5, 0, &[0; 3])), "").contains("requires a display"));
    assert!(error(&two((1, 0, &[6, 99])), "").contains("information of type 99"));
    assert!(error(&two((77, 0, &[])), "").contains("requires tag 77"));
    boot(&memory(16), &two((77, 1, &[])), None, &[], "").unwrap();
}
