# The hello guest: from the PVH entry point to long mode, interrupts, and the parts in order.
# Facts of the boot protocol: Xen, docs/misc/pvh.pandoc; start_info.h for the structure.
    .intel_syntax noprefix

    .set LAPIC, 0xfee00000

# XEN_ELFNOTE_PHYS32_ENTRY (18): where the 32-bit entry point is.
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long start

    .text
    .code32
    .globl start
start:
    cli
    cld
    mov esp, offset stack_top
    mov dword ptr [start_info], ebx
    # Map the first 4 GiB to themselves in pages of 2 MiB.
    mov dword ptr [pml4], offset pdpt + 3
    mov eax, offset directories + 3
    xor ecx, ecx
1:  mov dword ptr [pdpt + ecx * 8], eax
    add eax, 4096
    inc ecx
    cmp ecx, 4
    jne 1b
    mov eax, 0x83
    xor ecx, ecx
2:  mov dword ptr [directories + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 2b
    # PAE, the tables, long mode, paging: the order of Intel SDM 3A 9.8.5.
    mov eax, cr4
    or eax, 1 << 5
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 1 << 8
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    mov cr0, eax
    lgdt [gdt_pointer]
    push 8
    push offset long_mode
    retf

    .code64
long_mode:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    mov esp, offset stack_top
    call interrupts_init
    call serial_init
    call report
    jmp console

# Fills the interrupt table and puts the 8259s to vectors 32 and up, only the serial line open.
interrupts_init:
    mov edi, offset idt
    mov eax, offset exception_stubs
    mov ecx, 32
1:  call set_gate
    add eax, 5                      # the size of a stub
    loop 1b
    mov eax, offset spurious
    mov ecx, 16
2:  call set_gate
    loop 2b
    mov eax, offset serial_interrupt
    mov edi, offset idt + 36 * 16   # IRQ 4
    call set_gate
    lidt [idt_pointer]
    # Intel 8259A data sheet: ICW1 to ICW4, then the masks.
    mov esi, offset pic_program
    mov ecx, 10
3:  movzx edx, byte ptr [rsi]
    mov al, byte ptr [rsi + 1]
    out dx, al
    add esi, 2
    loop 3b
    # Virtual wire mode, should firmware have left it out: the 8259s' line is LINT0
    # (MultiProcessor Specification 1.4 3.6.2.2).
    mov ebx, LAPIC
    or dword ptr [rbx + 0xf0], 0x100
    mov dword ptr [rbx + 0x350], 0x700
    ret

# Writes an interrupt gate for the handler in EAX at EDI, and moves EDI to the next.
set_gate:
    mov dword ptr [rdi], eax        # offset 0 to 15; the selector overwrites the upper half
    mov word ptr [rdi + 2], 8
    mov dword ptr [rdi + 4], eax    # offset 16 to 31; the type overwrites the lower half
    mov word ptr [rdi + 4], 0x8e00
    add edi, 16
    ret

spurious:
    iretq

# Each stub is a call of five bytes: the return address tells the vector.
exception_stubs:
    .rept 32
    call exception
    .endr

exception:
    pop rbx
    sub ebx, offset exception_stubs + 5
    mov eax, ebx
    xor edx, edx
    mov ecx, 5
    div ecx
    mov ebx, eax
    mov esi, offset text_exception
    call puts
    mov eax, ebx
    call put_decimal
    mov esi, offset text_at
    call puts
    mov rax, qword ptr [rsp]
    mov ecx, 0x60227d00             # the vectors with an error code (Intel SDM 3A table 6-1)
    bt ecx, ebx
    jnc 1f
    mov rax, qword ptr [rsp + 8]
1:  call put_hex
    call newline
2:  cli
    hlt
    jmp 2b

    .section .rodata
gdt_pointer:
    .word 23
    .long gdt
    .balign 8
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
idt_pointer:
    .word 48 * 16 - 1
    .quad idt
# Port and value: vectors 32 and 40, cascade on line 2, 8086 mode, masks.
pic_program:
    .byte 0x20, 0x11, 0xa0, 0x11, 0x21, 32, 0xa1, 40, 0x21, 4, 0xa1, 2, 0x21, 1, 0xa1, 1
    .byte 0x21, 0xef, 0xa1, 0xff
text_exception:
    .asciz "\r\nexception "
text_at:
    .asciz " at "

    .bss
    .balign 16
idt:
    .skip 48 * 16
    .globl start_info
start_info:
    .skip 8
    .skip 4096
    .balign 16
stack_top:
