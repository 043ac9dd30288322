/* The counting guest: a disk of its own, no operating system.

   It counts on COM1, HZ lines a second, and meanwhile walks over its RAM round after round.  Every page of
   4096 bytes carries a stamp at its beginning, its middle and its end:

       u64 generation      the round that wrote it
       u64 check           (address of the stamp) xor (generation * GOLDEN)

   Round R finds generation R-1 in every page, or says BAD, and writes generation R.  So a page that is lost,
   old, torn in two or in a wrong place is found when the walk next comes by.  The count itself, the round and
   the place where the walk is are in memory too; if that were lost the count would show it.

   Lines (N and G decimal, T and A hexadecimal):

       hello counting 1 pages N tsc T      once, after power on and after a reset
       c N T                               N grows by one from line to line, T is the time stamp counter
       round G bad N                       round G is complete; N stamps were bad in it
       BAD page A want G got G             A is the stamp's address; equal Gs mean that the check word is wrong
       BAD register / BAD fault at A       an SSE register lost its value / the CPU met an exception
       e XX                                the byte XX came in on COM1

   Bytes from COM1 that do more than come back: D walk as fast as possible, I go back to the configured pace,
   Q power off (ACPI), Z reset.

   Memory: 0x500 e820 map, below 0x7000 the stack, 0x7c00 this, 0xa000 IDT, 0xb000 variables, 1 MiB page tables.
   Walked: all usable RAM above 64 KiB but for the page tables.  The host may change the values in `header`.

   Stack and variables have pages of their own because TCG is ten times slower where pages of code are written. */

        .intel_syntax noprefix
        .set    ORIGIN, 0x7c00
        .set    MAP, 0x500              /* e820 entries of 24 bytes */
        .set    MAP_END, 0x2000
        .set    STACK, 0x7000
        .set    IDT, 0xa000
        .set    VARIABLES, 0xb000
        .set    LOW, 0x10000            /* nothing below is walked */
        .set    TABLES, 0x100000
        .set    PAGE, 4096
        .set    COM1, 0x3f8
        .set    PIT_HZ, 1193182
        .set    PM1A_CONTROL, 0x604     /* where SeaBIOS puts it, on i440fx and q35 */
        .set    GOLDEN, 0x9e3779b97f4a7c15
        .set    BAD_LINES, 48           /* at most so many a round, lest the console be all there is */

        .set    count, VARIABLES        /* quad */
        .set    pages, VARIABLES + 8    /* quad */
        .set    tables_end, VARIABLES + 16  /* quad */
        .set    map_used, VARIABLES + 24    /* long, end of the e820 entries */
        .set    pace_now, VARIABLES + 28    /* long */
        .set    bad, VARIABLES + 32     /* long */
        .set    due, VARIABLES + 36     /* byte, a line is due */
        .set    ranges, VARIABLES + 64  /* pairs of quads: first, end; ended by zeros */
        .set    ranges_last, ranges + 16 * 30

        .code16
        .globl  start
start:  jmp     real

        .org    8
header: .ascii  "CPRCOUNT"
hz:     .long   100                     /* lines a second, 19 to 10000 */
pace:   .long   0xffffffff              /* pages walked between two lines once round 1 is done; all ones: no limit */
limit:  .quad   0                       /* bytes walked, 0: all */

real:   xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, STACK
        cld
        mov     di, VARIABLES           /* after a reset they are not zero */
        mov     cx, PAGE / 2
        rep     stosw
        push    dx
        mov     ax, 0x0200 + SECTORS    /* the sectors after this one; they are all on the first track */
        mov     bx, ORIGIN + 512
        mov     cx, 0x0002
        xor     dh, dh
        int     0x13
        pop     dx
        jc      dead
        mov     di, MAP
        xor     ebx, ebx
1:      mov     eax, 0xe820
        mov     edx, 0x534d4150         /* "SMAP" */
        mov     ecx, 24
        int     0x15
        jc      2f
        add     di, 24
        test    ebx, ebx
        jnz     1b
2:      mov     [map_used], di
        cli
        lgdt    [gdt_pointer]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        ljmp    0x08, offset protected
dead:   hlt
        jmp     dead

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff      /* 0x08 32-bit code */
        .quad   0x00cf92000000ffff      /* 0x10 data */
        .quad   0x00af9a000000ffff      /* 0x18 64-bit code */
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt
idt_pointer:
        .word   48 * 16 - 1
        .quad   IDT

        .org    510
        .word   0xaa55

        .code32
protected:
        mov     ax, 0x10
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, STACK
        mov     ebp, 1                  /* GiB to map: up to the end of the highest usable range */
        mov     esi, MAP
1:      cmp     esi, [map_used]
        jae     2f
        mov     eax, [esi]
        mov     edx, [esi + 4]
        add     eax, [esi + 8]
        adc     edx, [esi + 12]
        add     eax, 0x3fffffff
        adc     edx, 0
        shrd    eax, edx, 30
        cmp     dword ptr [esi + 16], 1
        lea     esi, [esi + 24]
        jne     1b
        cmp     eax, ebp
        cmovae  ebp, eax
        cmp     ebp, 512
        jb      1b
        mov     ebp, 512
2:      mov     edi, TABLES             /* one PML4, one PDPT and a page directory of 2 MiB pages for each GiB */
        xor     eax, eax
        lea     ecx, [ebp + 2]
        shl     ecx, 10
        rep     stosd
        mov     [tables_end], edi
        mov     dword ptr [TABLES], TABLES + PAGE + 3
        mov     edi, TABLES + PAGE
        mov     eax, TABLES + 2 * PAGE + 3
        mov     ecx, ebp
3:      mov     [edi], eax
        add     eax, PAGE
        add     edi, 8
        loop    3b
        mov     edi, TABLES + 2 * PAGE
        mov     ecx, ebp
        shl     ecx, 9
        mov     eax, 0x83
        xor     edx, edx
4:      mov     [edi], eax
        mov     [edi + 4], edx
        add     eax, 0x200000
        adc     edx, 0
        add     edi, 8
        loop    4b
        mov     eax, TABLES
        mov     cr3, eax
        mov     eax, 0x620              /* PAE, OSFXSR, OSXMMEXCPT */
        mov     cr4, eax
        mov     ecx, 0xc0000080         /* EFER.LME */
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, 0x80000011         /* PG, ET, PE */
        mov     cr0, eax
        ljmp    0x18, offset long_mode

        .code64
long_mode:
        mov     ax, 0x10
        mov     ss, ax
        mov     rsp, STACK

        mov     edi, IDT                /* 0 to 31 exceptions, 32 the timer, 33 to 47 ignored */
        xor     ecx, ecx
1:      mov     eax, offset on_fault
        cmp     ecx, 32
        jb      2f
        mov     eax, offset on_timer
        je      2f
        mov     eax, offset on_spurious
2:      mov     [rdi], ax
        mov     word ptr [rdi + 2], 0x18
        mov     word ptr [rdi + 4], 0x8e00
        shr     eax, 16
        mov     [rdi + 6], eax
        mov     qword ptr [rdi + 8], 0
        add     edi, 16
        inc     ecx
        cmp     ecx, 48
        jb      1b
        lidt    [idt_pointer]

        mov     rsi, offset port_setup  /* COM1 115200 8n1 with FIFO; PICs at 32 and 40, all but IRQ 0 masked */
3:      lodsw
        movzx   edx, ax
        test    edx, edx
        jz      4f
        lodsb
        out     dx, al
        jmp     3b
4:      mov     eax, PIT_HZ
        xor     edx, edx
        div     dword ptr [hz]
        out     0x40, al
        mov     al, ah
        out     0x40, al

        call    make_ranges
        mov     rsi, offset text_hello
        call    put_text
        mov     rax, [pages]
        call    put_decimal
        mov     rsi, offset text_tsc
        call    put_text
        call    put_tsc_line

        mov     rax, GOLDEN
        movq    xmm7, rax
        mov     eax, [pace]
        mov     [pace_now], eax
        sti

        /* r12 the page walked next, r13 the end of its range, r14 the range, r15 the round (generation),
           r8 and r9 generation * GOLDEN of the last and of this round, ebx pages left until the next line */
        xor     r15, r15
        xor     ebx, ebx
next_round:
        inc     r15
        mov     rax, GOLDEN
        mov     r9, r15
        imul    r9, rax
        mov     r8, r9
        sub     r8, rax
        mov     r14, offset ranges
        mov     r12, [r14]
        mov     r13, [r14 + 8]
        mov     dword ptr [bad], 0

main:   cmp     byte ptr [due], 0
        jne     tick
        cmp     r15, 1                  /* the first round has nothing to check and goes on at full speed */
        je      5f
        cmp     dword ptr [pace_now], -1
        je      5f
        test    ebx, ebx
        jz      idle
        dec     ebx
5:      cmp     r12, r13
        jae     next_range
        cmp     r15, 1
        je      6f
        mov     rdi, r12
        call    check_stamp
        lea     rdi, [r12 + PAGE / 2]
        call    check_stamp
        lea     rdi, [r12 + PAGE - 16]
        call    check_stamp
6:      mov     rax, r12
        xor     rax, r9
        mov     [r12], r15
        mov     [r12 + 8], rax
        lea     rax, [r12 + PAGE / 2]
        xor     rax, r9
        mov     [r12 + PAGE / 2], r15
        mov     [r12 + PAGE / 2 + 8], rax
        lea     rax, [r12 + PAGE - 16]
        xor     rax, r9
        mov     [r12 + PAGE - 16], r15
        mov     [r12 + PAGE - 8], rax
        add     r12, PAGE
        jmp     main

next_range:
        add     r14, 16
        mov     r12, [r14]
        mov     r13, [r14 + 8]
        test    r13, r13
        jnz     main
        mov     rsi, offset text_round
        call    put_text
        mov     rax, r15
        call    put_decimal
        mov     rsi, offset text_bad
        call    put_text
        mov     eax, [bad]
        call    put_decimal
        call    put_newline
        jmp     next_round

idle:   cli
        cmp     byte ptr [due], 0
        jne     tick
        sti                             /* takes effect after the hlt has begun */
        hlt
        jmp     main

tick:   sti
        mov     byte ptr [due], 0
        mov     ebx, [pace_now]
        mov     al, 'c'
        call    put_byte
        mov     al, ' '
        call    put_byte
        inc     qword ptr [count]
        mov     rax, [count]
        call    put_decimal
        mov     al, ' '
        call    put_byte
        call    put_tsc_line
        movq    rax, xmm7
        mov     rdx, GOLDEN
        cmp     rax, rdx
        je      7f
        movq    xmm7, rdx
        mov     rsi, offset text_bad_register
        call    put_text
7:      mov     edx, COM1 + 5           /* everything that came in */
        in      al, dx
        test    al, 1
        jz      main
        cmp     al, 0xff                /* no such port */
        je      main
        mov     edx, COM1
        in      al, dx
        movzx   ebp, al
        mov     rsi, offset text_echo
        call    put_text
        mov     eax, ebp
        shl     rax, 56
        mov     ecx, 2
        call    put_hex_digits
        call    put_newline
        cmp     ebp, 'D'
        je      dirty
        cmp     ebp, 'I'
        je      paced
        cmp     ebp, 'Q'
        je      power_off
        cmp     ebp, 'Z'
        je      reset
        jmp     7b
dirty:  mov     dword ptr [pace_now], -1
        jmp     7b
paced:  mov     eax, [pace]
        mov     [pace_now], eax
        xor     ebx, ebx
        jmp     7b
power_off:
        mov     edx, PM1A_CONTROL
        mov     ax, 0x2000              /* SLP_EN, S5 */
        out     dx, ax
        jmp     7b
reset:  mov     al, 0xfe
        out     0x64, al
        jmp     7b

/* Compare the stamp at rdi with what the last round wrote there. */
check_stamp:
        mov     rax, [rdi]
        lea     rdx, [r15 - 1]
        cmp     rax, rdx
        jne     8f
        mov     rax, rdi
        xor     rax, r8
        cmp     rax, [rdi + 8]
        jne     8f
        ret
8:      inc     dword ptr [bad]
        cmp     dword ptr [bad], BAD_LINES
        ja      9f
        push    rdi
        mov     rsi, offset text_bad_page
        call    put_text
        mov     rax, [rsp]
        call    put_hex
        mov     rsi, offset text_want
        call    put_text
        lea     rax, [r15 - 1]
        call    put_decimal
        mov     rsi, offset text_got
        call    put_text
        pop     rdi
        mov     rax, [rdi]
        call    put_decimal
        call    put_newline
9:      ret

/* Turn the e820 map into ranges of whole pages that are walked, as many as `limit` allows. */
make_ranges:
        mov     esi, MAP
        mov     edi, offset ranges
        mov     r10, [limit]
        test    r10, r10
        jnz     1f
        dec     r10
1:      cmp     esi, [map_used]
        jae     9f
        mov     rax, [rsi]
        mov     rdx, [rsi + 8]
        add     rdx, rax
        add     rax, PAGE - 1
        and     rax, -PAGE
        and     rdx, -PAGE
        mov     ecx, [rsi + 16]
        add     esi, 24
        cmp     ecx, 1
        jne     1b
        mov     ecx, LOW                /* leave out this program ... */
        cmp     rax, rcx
        cmovb   rax, rcx
        mov     rcx, [tables_end]       /* ... and the page tables */
        cmp     rax, TABLES
        jb      2f
        cmp     rax, rcx
        cmovb   rax, rcx
2:      sub     rdx, rax
        jbe     1b
        cmp     rdx, r10
        cmova   rdx, r10
        and     rdx, -PAGE
        jz      9f
        sub     r10, rdx
        mov     rcx, rdx
        shr     rcx, 12
        add     [pages], rcx
        add     rdx, rax
        mov     [rdi], rax
        mov     [rdi + 8], rdx
        add     edi, 16
        cmp     edi, offset ranges_last
        jb      1b
9:      mov     qword ptr [rdi], 0
        mov     qword ptr [rdi + 8], 0
        ret

/* Output.  All of these may change rax, rcx, rdx and rsi. */
put_text:
        lodsb
        test    al, al
        jz      9f
        call    put_byte
        jmp     put_text
9:      ret

put_newline:
        mov     al, '\n'
put_byte:
        push    rdx
        mov     ah, al
        mov     edx, COM1 + 5
1:      in      al, dx
        test    al, 0x20
        jz      1b
        mov     edx, COM1
        mov     al, ah
        out     dx, al
        pop     rdx
        ret

put_tsc_line:
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        call    put_hex
        jmp     put_newline

put_hex:
        mov     ecx, 16
1:      rol     rax, 4                  /* no leading zeros */
        test    al, 15
        jnz     2f
        dec     ecx
        cmp     ecx, 1
        ja      1b
        rol     rax, 4
2:      ror     rax, 4
put_hex_digits:                         /* ecx digits from the top of rax */
        rol     rax, 4
        push    rax
        and     al, 15
        cmp     al, 10
        jb      1f
        add     al, 'a' - '0' - 10
1:      add     al, '0'
        call    put_byte
        pop     rax
        dec     ecx
        jnz     put_hex_digits
        ret

put_decimal:
        mov     esi, 10
        xor     ecx, ecx
1:      xor     edx, edx
        div     rsi
        push    rdx
        inc     ecx
        test    rax, rax
        jnz     1b
2:      pop     rax
        add     al, '0'
        call    put_byte
        dec     ecx
        jnz     2b
        ret

on_timer:
        push    rax
        mov     byte ptr [due], 1
        mov     al, 0x20
        out     0x20, al
        pop     rax
        iretq
on_spurious:
        iretq
on_fault:                               /* with or without an error code, the address is on the stack */
        mov     rsi, offset text_fault
        call    put_text
        mov     rax, [rsp]
        cmp     rax, LOW
        jb      1f
        mov     rax, [rsp + 8]
1:      call    put_hex
        call    put_newline
2:      cli
        hlt
        jmp     2b

port_setup:
        .macro  port number, value
        .word   \number
        .byte   \value
        .endm
        port    COM1 + 1, 0
        port    COM1 + 3, 0x80
        port    COM1 + 0, 1
        port    COM1 + 1, 0
        port    COM1 + 3, 0x03
        port    COM1 + 2, 0x07
        port    COM1 + 4, 0x03
        port    0x20, 0x11
        port    0xa0, 0x11
        port    0x21, 32
        port    0xa1, 40
        port    0x21, 4
        port    0xa1, 2
        port    0x21, 1
        port    0xa1, 1
        port    0x21, 0xfe
        port    0xa1, 0xff
        port    0x43, 0x34
        .word   0

text_hello:         .asciz "\nhello counting 1 pages "
text_tsc:           .asciz " tsc "
text_round:         .asciz "round "
text_bad:           .asciz " bad "
text_bad_page:      .asciz "BAD page "
text_want:          .asciz " want "
text_got:           .asciz " got "
text_bad_register:  .asciz "BAD register\n"
text_fault:         .asciz "BAD fault at "
text_echo:          .asciz "e "

        .org    512 * (1 + SECTORS)
