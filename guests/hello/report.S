# What the guest finds: CPU, memory, firmware tables, clock, devices.
    .intel_syntax noprefix
    .set COM1, 0x3f8
    .set PM_TICKS, 7159             # 2 ms of the 3.579545 MHz timer (ACPI 6.5 4.8.3.3)

    .text
    .globl report
report:
    mov esi, offset text_title
    call puts
    call report_mode
    call report_cpu
    call read_acpi
    mov esi, offset text_cpus
    call puts
    mov eax, dword ptr [cpus]
    call put_decimal
    call report_memory
    call report_clock
    call report_devices
    call report_pci
    jmp newline

# EFER.LMA and CR0.PG are the proof.
report_mode:
    mov esi, offset text_mode
    call puts
    mov ecx, 0xc0000080
    rdmsr
    mov esi, offset text_long
    bt eax, 10
    jc puts
    mov esi, offset text_unknown
    jmp puts

# Vendor and brand (Intel SDM 2A, CPUID leaves 0 and 80000002H to 80000004H).
report_cpu:
    mov esi, offset text_cpu
    call puts
    xor eax, eax
    cpuid
    mov dword ptr [text], ebx
    mov dword ptr [text + 4], edx
    mov dword ptr [text + 8], ecx
    mov dword ptr [text + 12], 0
    mov esi, offset text
    call puts
    mov eax, 0x80000000
    cpuid
    cmp eax, 0x80000004
    jb 3f
    mov edi, offset text
    mov r8d, 0x80000002
1:  mov eax, r8d
    cpuid
    mov dword ptr [rdi], eax
    mov dword ptr [rdi + 4], ebx
    mov dword ptr [rdi + 8], ecx
    mov dword ptr [rdi + 12], edx
    add edi, 16
    inc r8d
    cmp r8d, 0x80000005
    jne 1b
    mov dword ptr [rdi], 0
    mov esi, offset text_comma
    call puts
    mov esi, offset text            # Intel pads on the left
2:  cmp byte ptr [rsi], ' '
    jne 4f
    inc esi
    jmp 2b
3:  ret
4:  jmp puts

# Finds the tables: RSDP (start_info offset 32), then XSDT or RSDT (ACPI 6.5 5.2.5 to 5.2.8).
read_acpi:
    mov ebx, dword ptr [start_info]
    mov rbx, qword ptr [rbx + 32]
    test rbx, rbx
    jz 9f
    mov r8d, 4                      # size of an entry
    mov r9d, dword ptr [rbx + 16]
    cmp byte ptr [rbx + 15], 2
    jb 1f
    mov r8d, 8
    mov r9, qword ptr [rbx + 24]
1:  mov r10d, dword ptr [r9 + 4]
    add r10, r9                     # end of the list
    add r9, 36
2:  cmp r9, r10
    jae 9f
    mov ebx, dword ptr [r9]
    add r9, r8
    mov eax, dword ptr [rbx]
    cmp eax, 0x43495041             # "APIC"
    je madt
    cmp eax, 0x50434146             # "FACP"
    je fadt
    cmp eax, 0x54455048             # "HPET"
    jne 2b
    mov eax, dword ptr [rbx + 44]
    mov dword ptr [hpet], eax
    jmp 2b
fadt:
    mov eax, dword ptr [rbx + 64]
    mov dword ptr [pm1_control], eax
    mov eax, dword ptr [rbx + 76]
    mov dword ptr [pm_timer], eax
    mov ebx, dword ptr [rbx + 40]
    call find_sleep_type
    jmp 2b
madt:
    mov ecx, dword ptr [rbx + 4]
    add ecx, ebx
    add ebx, 44
3:  cmp ebx, ecx
    jae 2b
    movzx eax, byte ptr [rbx]
    cmp eax, 1
    je 5f
    lea edx, [rbx + 4]              # flags of a local APIC, of an x2APIC
    test eax, eax
    je 4f
    lea edx, [rbx + 8]
    cmp eax, 9
    jne 6f
4:  mov eax, dword ptr [rdx]
    and eax, 1
    add dword ptr [cpus], eax
    jmp 6f
5:  mov eax, dword ptr [rbx + 4]
    mov dword ptr [ioapic], eax
6:  movzx eax, byte ptr [rbx + 1]
    test eax, eax
    jz 2b
    add ebx, eax
    jmp 3b
9:  ret

# Looks in the DSDT at EBX for the package _S5: its first element is the sleep type.
find_sleep_type:
    mov ecx, dword ptr [rbx + 4]
    sub ecx, 44
    jbe 3f
    add ebx, 36
1:  cmp dword ptr [rbx], 0x5f35535f # "_S5_"
    je 2f
    inc ebx
    loop 1b
    ret
2:  cmp byte ptr [rbx + 4], 0x12    # a package
    jne 3f
    movzx eax, byte ptr [rbx + 5]   # the upper two bits: more bytes of its length
    shr eax, 6
    lea ebx, [rbx + rax + 7]
    movzx eax, byte ptr [rbx]
    cmp eax, 0x0a                   # a byte follows; otherwise it is Zero or One itself
    jne 4f
    movzx eax, byte ptr [rbx + 1]
4:  mov dword ptr [sleep_type], eax
3:  ret

# Adds up the RAM in the memory map (start_info offsets 40 and 48).
report_memory:
    mov esi, offset text_memory
    call puts
    mov ebx, dword ptr [start_info]
    mov ecx, dword ptr [rbx + 48]
    mov ebx, dword ptr [rbx + 40]
    xor eax, eax
    xor edx, edx
    jecxz 3f
1:  cmp dword ptr [rbx + 16], 1
    jne 2f
    add rax, qword ptr [rbx + 8]
    inc edx
2:  add ebx, 24
    loop 1b
3:  add rax, 0xfffff                # the legacy hole leaves it just short of a round number
    shr rax, 20
    call put_decimal
    mov esi, offset text_mib
    call puts
    mov eax, edx
    call put_decimal
    mov esi, offset text_ranges
    jmp puts

# Counts TSC cycles over 2 ms of the PM timer; a timer that stands still ends the wait.
report_clock:
    mov esi, offset text_clock
    call puts
    mov edx, dword ptr [pm_timer]
    test edx, edx
    jz 3f
    call read_tsc
    mov r8, rax
    in eax, dx
    mov ebx, eax
    mov ecx, 1000000
1:  in eax, dx
    sub eax, ebx
    and eax, 0xffffff               # 24 bits at least
    cmp eax, PM_TICKS
    jae 2f
    loop 1b
    jmp 3f
2:  call read_tsc
    sub rax, r8
    xor edx, edx
    mov ecx, 2000                   # cycles in 2 ms to MHz
    div rcx
    call put_decimal
    mov esi, offset text_mhz
    jmp puts
3:  mov esi, offset text_unknown
    jmp puts

read_tsc:
    push rdx
    rdtsc
    shl rdx, 32
    or rax, rdx
    pop rdx
    ret

# Each device is asked, not believed: a register written and read back, or one that identifies it.
report_devices:
    mov esi, offset text_devices
    call puts
    mov edx, COM1 + 7               # scratch
    mov al, 0x5a
    out dx, al
    in al, dx
    cmp al, 0x5a
    jne 1f
    mov esi, offset text_serial
    call puts
1:  in al, 0x21                     # the mask that was set
    cmp al, 0xef
    jne 2f
    mov esi, offset text_pic
    call puts
2:  mov ebx, dword ptr [ioapic]
    test ebx, ebx
    jz 3f
    mov esi, offset text_ioapic
    call puts
    mov eax, ebx
    call put_hex
    mov esi, offset text_with
    call puts
    mov dword ptr [rbx], 1          # version register: the last line's number
    mov eax, dword ptr [rbx + 16]
    shr eax, 16
    movzx eax, al
    inc eax
    call put_decimal
    mov esi, offset text_lines
    call puts
3:  mov ebx, dword ptr [hpet]
    test ebx, ebx
    jz 4f
    mov esi, offset text_hpet
    call puts
    mov eax, ebx
    call put_hex
    mov esi, offset text_with
    call puts
    mov eax, dword ptr [rbx]        # capabilities: the last comparator's number
    shr eax, 8
    and eax, 31
    inc eax
    call put_decimal
    mov esi, offset text_timers
    call puts
4:  mov eax, dword ptr [pm_timer]
    test eax, eax
    jz 5f
    mov esi, offset text_timer
    call puts
    call put_hex
5:  ret

# All functions of bus 0, over configuration mechanism 1 (PCI 3.0 3.2.2.3.2).
report_pci:
    mov ebx, 0x80000000
1:  xor ecx, ecx
    call read_config
    cmp ax, 0xffff
    je 4f
    mov r8d, eax
    mov esi, offset text_pci
    call puts
    mov eax, ebx
    shr eax, 11
    and eax, 31
    mov ecx, 2
    call put_hex_digits
    mov al, '.'
    call putc
    mov eax, ebx
    shr eax, 8
    and eax, 7
    call put_hex
    mov al, ' '
    call putc
    movzx eax, r8w
    mov ecx, 4
    call put_hex_digits
    mov al, ':'
    call putc
    mov eax, r8d
    shr eax, 16
    mov ecx, 4
    call put_hex_digits
    mov esi, offset text_class
    call puts
    mov ecx, 8
    call read_config
    shr eax, 16
    mov ecx, 4
    call put_hex_digits
    test ebx, 0x700
    jnz 4f
    mov ecx, 12                     # header type: whether there are more functions
    call read_config
    bt eax, 23
    jnc 5f
4:  mov eax, ebx                    # an absent function 0: no others
    and eax, 0x700
    jnz 6f
    xor ecx, ecx
    call read_config
    cmp ax, 0xffff
    je 5f
6:  add ebx, 0x100
    jmp 7f
5:  add ebx, 0x800
7:  cmp ebx, 0x80010000
    jb 1b
    ret

# Reads register ECX of the function in EBX.
read_config:
    lea eax, [rbx + rcx]
    mov edx, 0xcf8
    out dx, eax
    mov edx, 0xcfc
    in eax, dx
    ret

    .section .rodata
text_title:
    .asciz "Hello from a guest that fits into a few KiB.\r\n"
text_mode:
    .asciz "  mode     "
text_long:
    .asciz "64-bit long mode, entered over PVH"
text_unknown:
    .asciz "unknown"
text_cpu:
    .asciz "\r\n  CPU      "
text_comma:
    .asciz ", "
text_cpus:
    .asciz "\r\n  CPUs     "
text_memory:
    .asciz "\r\n  memory   "
text_mib:
    .asciz " MiB in "
text_ranges:
    .asciz " ranges"
text_clock:
    .asciz "\r\n  clock    TSC "
text_mhz:
    .asciz " MHz by the ACPI timer"
text_devices:
    .asciz "\r\n  devices "
text_serial:
    .asciz " serial port at 3f8"
text_pic:
    .asciz ", 8259 pair"
text_ioapic:
    .asciz "\r\n           I/O APIC at "
text_hpet:
    .asciz "\r\n           HPET at "
text_with:
    .asciz " with "
text_lines:
    .asciz " lines"
text_timers:
    .asciz " timers"
text_timer:
    .asciz "\r\n           ACPI timer at "
text_pci:
    .asciz "\r\n  PCI      00:"
text_class:
    .asciz " class "

    .data
    .balign 4
    .globl pm1_control
pm1_control:
    .long 0x604                     # where it is on this machine should the tables not say
    .globl sleep_type
sleep_type:
    .long 5
cpus:
    .long 0
ioapic:
    .long 0
hpet:
    .long 0
pm_timer:
    .long 0

    .bss
    .balign 8
text:
    .skip 64
