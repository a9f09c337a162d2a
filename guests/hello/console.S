# The serial console: output, interrupt-driven input, and the commands.
# Registers of the 16550: National PC16550D data sheet, table II.
    .intel_syntax noprefix
    .set COM1, 0x3f8
    .set LINE, 250                  # longest line kept

    .text
    .globl serial_init
serial_init:
    mov esi, offset serial_program
    mov ecx, 6
1:  mov edx, COM1
    add dl, byte ptr [rsi]
    mov al, byte ptr [rsi + 1]
    out dx, al
    add esi, 2
    loop 1b
    ret

# Writes AL.
    .globl putc
putc:
    push rdx
    push rax
    mov edx, COM1 + 5
1:  in al, dx
    test al, 0x20                   # transmitter holding register empty
    jz 1b
    pop rax
    mov edx, COM1
    out dx, al
    pop rdx
    ret

    .globl newline
newline:
    mov esi, offset text_newline
# Writes the text at RSI, which ends with NUL.
    .globl puts
puts:
    push rax
1:  lodsb
    test al, al
    jz 2f
    call putc
    jmp 1b
2:  pop rax
    ret

# Writes RAX in decimal.
    .globl put_decimal
put_decimal:
    push rcx
    push rdx
    mov ecx, 10
    push 0                          # end mark
1:  xor edx, edx
    div rcx
    add edx, '0'
    push rdx
    test rax, rax
    jnz 1b
2:  pop rax
    test eax, eax
    jz 3f
    call putc
    jmp 2b
3:  pop rdx
    pop rcx
    ret

# Writes RAX in hexadecimal without leading zeros, or in ECX digits.
    .globl put_hex
    .globl put_hex_digits
put_hex:
    mov ecx, 1
put_hex_digits:
    push rdx
    push rbx
    push 0
1:  mov edx, eax
    and edx, 15
    movzx edx, byte ptr [rdx + hex_digits]
    push rdx
    shr rax, 4
    dec ecx
    jg 1b
    test rax, rax
    jnz 1b
2:  pop rax
    test eax, eax
    jz 3f
    call putc
    jmp 2b
3:  pop rbx
    pop rdx
    ret

# IRQ 4: moves what has arrived into the ring; full, it drops.
    .globl serial_interrupt
serial_interrupt:
    push rax
    push rcx
    push rdx
1:  mov edx, COM1 + 5
    in al, dx
    test al, 1                      # data ready
    jz 2f
    mov edx, COM1
    in al, dx
    mov ecx, dword ptr [ring_head]
    mov edx, ecx
    sub edx, dword ptr [ring_tail]
    cmp edx, 256
    je 1b
    movzx edx, cl
    mov byte ptr [rdx + ring], al
    inc dword ptr [ring_head]
    jmp 1b
2:  mov edx, COM1 + 2
    in al, dx                       # reading the identification clears what else is pending
    mov al, 0x20                    # end of interrupt
    out 0x20, al
    pop rdx
    pop rcx
    pop rax
    iretq

# Waits in HLT for a character and gives it in AL.
getc:
    cli
    mov ecx, dword ptr [ring_tail]
    cmp ecx, dword ptr [ring_head]
    jne 1f
    sti                             # takes effect after HLT has begun: no wake-up is lost
    hlt
    jmp getc
1:  movzx edx, cl
    mov al, byte ptr [rdx + ring]
    inc dword ptr [ring_tail]
    ret

# The prompt. EBX: characters in the line; EBP: the last character.
    .globl console
console:
    mov esi, offset text_help
    call puts
    mov edx, COM1 + 1
    mov al, 1                       # interrupt on received data
    out dx, al
    xor ebp, ebp
prompt:
    mov esi, offset text_prompt
    call puts
    xor ebx, ebx
next:
    call getc
    mov ecx, ebp
    movzx ebp, al
    cmp al, 4                       # Ctrl-D
    je poweroff
    cmp al, 13
    je enter
    cmp al, 10
    je line_feed
    cmp al, 8
    je erase
    cmp al, 127
    je erase
    cmp al, 32
    jb next
    cmp ebx, LINE
    jae next
    mov byte ptr [rbx + line], al
    inc ebx
    call putc
    jmp next
erase:
    test ebx, ebx
    jz next
    dec ebx
    mov esi, offset text_erase
    call puts
    jmp next
line_feed:
    cmp ecx, 13                     # the second half of a CR LF
    je next
enter:
    mov byte ptr [rbx + line], 0
    call newline
    mov edi, offset text_poweroff
    call is_line
    je poweroff
    mov edi, offset text_reboot
    call is_line
    je reboot
    mov edi, offset text_crash
    call is_line
    je crash
    test ebx, ebx
    jz prompt
    mov esi, offset line
    call puts
    call newline
    jmp prompt

# Whether the line is the text at RDI.
is_line:
    mov esi, offset line
    lea ecx, [rbx + 1]
    repe cmpsb
    ret

poweroff:
    mov esi, offset text_bye
    call puts
    call drain
    # PM1 control: SLP_TYP and SLP_EN (ACPI 6.5 4.8.3.2.1).
    mov edx, dword ptr [pm1_control]
    mov eax, dword ptr [sleep_type]
    shl eax, 10
    or eax, 1 << 13
    out dx, ax
    jmp stop
reboot:
    call drain
    mov edx, 0xcf9                  # reset control: full reset
    mov al, 6
    out dx, al
    jmp stop
crash:
    call drain
    lidt [no_idt]
    ud2
stop:
    cli
    hlt
    jmp stop

# Waits until the last character has left.
drain:
    mov edx, COM1 + 5
    mov ecx, 100000
1:  in al, dx
    test al, 0x40                   # transmitter empty
    loopz 1b
    ret

    .section .rodata
# Register and value: no interrupts, divisor 1 (115200 baud), 8N1, DTR, RTS and OUT2. The FIFOs
# stay as they are: switching them would drop what has been typed already.
serial_program:
    .byte 1, 0, 3, 0x80, 0, 1, 1, 0, 3, 3, 4, 0x0b
no_idt:
    .word 0
    .quad 0
hex_digits:
    .ascii "0123456789abcdef"
text_help:
    .ascii "Type a line to see it again; \"poweroff\" (or Ctrl-D), \"reboot\" and \"crash\" do "
    .ascii "what they say."
text_newline:
    .asciz "\r\n"
text_prompt:
    .asciz "> "
text_erase:
    .asciz "\b \b"
text_poweroff:
    .asciz "poweroff"
text_reboot:
    .asciz "reboot"
text_crash:
    .asciz "crash"
text_bye:
    .asciz "bye\r\n"

    .bss
    .balign 8
ring_head:
    .skip 4
ring_tail:
    .skip 4
ring:
    .skip 256
line:
    .skip 256
