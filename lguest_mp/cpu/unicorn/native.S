/* The handful of instructions that stand between Unicorn and the guest.

   What the library leaves to its user (delivering exceptions, SYSCALL, external interrupts), and what it gets wrong
   (which pages hold translated code), is done here, in machine code: these run hundreds of thousands of times a
   second, some of them leave by longjmp, which must not cross a Python frame, and a user of this package has no
   compiler. `tools/build-native` assembles this file into native_code.py; a test checks that they match.

   internals.py copies the code to an executable page. The page after it is `table`: addresses of the library's
   functions, of Python callbacks and of the structures, filled in before anything runs. GNU as, Intel syntax.
   Offsets into env (struct CPUX86State) and cs (struct CPUState) are those of Unicorn 2.1.4, which internals.py
   verifies. Calling convention: System V AMD64; at each entry rsp is 8 modulo 16. */

        .intel_syntax noprefix
        .text

        /* env: target/i386/cpu.h */
        .set ENV_RAX, 0*8
        .set ENV_RCX, 1*8
        .set ENV_RDX, 2*8
        .set ENV_RSP, 4*8
        .set ENV_R11, 11*8
        .set ENV_EIP, 0x80
        .set ENV_EFLAGS, 0x88
        .set ENV_CC_SRC, 0x98
        .set ENV_CC_OP, 0xa8
        .set ENV_DF, 0xac
        .set ENV_HFLAGS, 0xb0
        .set ENV_SEG_CS, 0xd0
        .set ENV_SEG_SS, 0xe8
        .set ENV_EFER, 0x250
        .set ENV_STAR, 0x12d8
        .set ENV_LSTAR, 0x12e8
        .set ENV_CSTAR, 0x12f0
        .set ENV_FMASK, 0x12f8
        .set ENV_CR2, 0x1b8
        .set ENV_OLD_EXCEPTION, 0x1578
        /* SegmentCache */
        .set SELECTOR, 0
        .set BASE, 8
        .set LIMIT, 16
        .set FLAGS, 20

        /* struct CPUState */
        .set CS_INTERRUPT_REQUEST, 0x1c

        .set CC_OP_EFLAGS, 1
        .set HF_CPL, 3
        .set HF_INHIBIT_IRQ, 1 << 3
        .set HF_CS32, 1 << 4
        .set HF_SS32, 1 << 5
        .set HF_ADDSEG, 1 << 6
        .set HF_LMA, 1 << 14
        .set HF_CS64, 1 << 15
        .set IF_MASK, 1 << 9
        .set RF_MASK, 1 << 16
        .set VM_MASK, 1 << 17
        .set DF_MASK, 1 << 10
        .set CC_MASK, 0x8d5
        .set EXCP06_ILLOP, 6
        .set EXCP0D_GPF, 13
        .set EXCP0E_PAGE, 14
        .set ERROR_WRITE, 2
        .set ERROR_USER, 4

        /* struct TCGContext */
        .set CTX_ENV, 0x98f0            /* cpu_env - tcg_ctx */
        .set CTX_UC, 0x9970
        /* From env to cs->icount_decr, whose sign says that somebody wants the CPU's attention. */
        .set ENV_ICOUNT_DECR, -0x10
        .set INDEX_OP_SET_LABEL, 1
        .set INDEX_OP_LD_I32, 13
        .set TCG_TYPE_I32, 0
        .set TCG_COND_GE, 3
        .set LABEL_PRESENT, 1           /* in a label's first byte */
        .set INDEX_OP_MB, 4
        .set MO_ALL_BAR_SC, 0x3f        /* TCG_MO_ALL | TCG_BAR_SC */
        .set MMU_DATA_STORE, 1
        .set MMU_INST_FETCH, 2
        .set MMU_USER_IDX, 1
        .set PAGE_WRITE, 2
        .set PAGE_EXEC, 4
        .set PAGE_SHIFT, 12
        .set BLOCK_SHIFT, 21
        .set table, start + 4096

        /* The table; internals.py fills it by these names. */
        .macro slot name, number
        .set \name, table + 8*\number
        .endm
        slot do_interrupt, 0            /* x86_cpu_do_interrupt(cs) */
        slot do_hardirq, 1              /* do_interrupt_x86_hardirq(env, vector, 1) */
        slot read_eflags, 2             /* helper_read_eflags(env) */
        slot raise_exception, 3         /* helper_raise_exception(env, vector) */
        slot restore_state, 4           /* cpu_restore_state(cs, host_pc, will_exit) */
        slot check_iob, 5               /* helper_check_iob(env, port), and so on */
        slot check_iow, 6
        slot check_iol, 7
        slot original_cpuid, 8
        slot original_rdmsr, 9
        slot original_wrmsr, 10
        slot tlb_reset_dirty, 11        /* tlb_reset_dirty(cs, host_address, length) */
        slot invalidate_fast, 12        /* tb_invalidate_phys_page_fast(uc, pages, start, len, retaddr) */
        slot original_set_dirty, 13     /* tlb_set_dirty(cs, vaddr) */
        slot python_take, 14            /* int take(void): a vector, -1: none, -2: it has been delivered */
        slot python_jobs, 15            /* void jobs(void) */
        slot python_in, 16              /* uint64 in(port, size) */
        slot python_out, 17             /* void out(port, size, value) */
        slot python_cpuid, 18           /* void cpuid(leaf, subleaf): changes the registers */
        slot python_rdmsr, 19           /* int rdmsr(index): 1 and `value` set, or 0 */
        slot python_wrmsr, 20           /* int wrmsr(index, value): 1, or 0: not the platform's */
        slot cpu_state, 21                     /* CPUState */
        slot cpu_env, 22                    /* CPUX86State */
        slot ram, 23                    /* host address of ram address 0 */
        slot code_map, 24               /* one byte per page of RAM: holds translated code */
        slot code_pages, 25             /* how many */
        slot last_write, 26             /* ram address of the last store that took the slow path */
        slot jobs_wanted, 27            /* not 0: run python_jobs between two blocks */
        slot value, 28                  /* what python_rdmsr read */
        slot original_fill, 29          /* x86_cpu_tlb_fill(cs, vaddr, size, access, mmu_idx, probe, retaddr) */
        slot original_set_page, 30      /* tlb_set_page_with_attrs(cs, vaddr, paddr, attrs, prot, mmu_idx, size) */
        slot original_lookup, 32        /* helper_lookup_tb_ptr(env) */
        slot epilogue, 33               /* tcg_ctx->code_gen_epilogue: where a block returns to the main loop */
        slot access, 31                 /* MMUAccessType of the TLB miss that is being handled */
        slot gen_op1, 34                /* tcg_gen_op1(tcg_ctx, opcode, argument) */
        slot original_xchg, 35        /* tcg_gen_atomic_xchg_i64(tcg_ctx, …), and so on */
        slot original_cmpxchg, 36
        slot original_fetch_add, 37
        slot original_fetch_and, 38
        slot original_fetch_or, 39
        slot original_fetch_xor, 40
        slot original_add_fetch, 41
        slot original_and_fetch, 42
        slot original_or_fetch, 43
        slot original_xor_fetch, 44
        slot gate, 45                   /* address of a u32: while that is 0, nobody wants to be interrupted */
        slot python_trap, 46            /* void trap(vector): delivers an exception or INT n */
        slot direct, 47                 /* 256 bits (4 entries): vectors that go through the guest's IDT all the same */
        slot delivering, 51             /* that vector + 1 while it does, or 0 */
        slot trap_flags, 52             /* EFLAGS when python_trap is called */
        slot physical_limit, 53         /* nothing behind it is mapped, whatever the guest's page tables say … */
        slot reserved, 54               /* … except at and above this virtual address */
        slot beyond, 55                 /* the physical address of an access there that has become a page fault, or 0 */
        slot fill_address, 56           /* the virtual address of the TLB miss that is being handled … */
        slot fill_return, 57            /* … and where in translated code it happened */
        slot raise_error, 58            /* raise_exception_err_ra(env, vector, error, host_pc) */
        slot load_data, 59              /* cpu_ldl_data_ra(env, vaddr, host_pc) */
        slot original_iret, 60          /* helper_iret_protected(env, shift, next_eip) */
        slot original_call, 61          /* tcg_gen_callN(tcg_ctx, function, result, count, arguments) */
        slot check_exit, 62             /* helper_check_exit_request(uc, 0) */
        slot new_label, 63              /* gen_new_label(tcg_ctx) */
        slot new_temp, 64               /* tcg_temp_new_internal(tcg_ctx, type, is_local) */
        slot free_temp, 65              /* tcg_temp_free_internal(tcg_ctx, temp) */
        slot gen_op3, 66                /* tcg_gen_op3(tcg_ctx, opcode, argument, argument, argument) */
        slot gen_branch, 67             /* tcg_gen_brcondi_i32(tcg_ctx, condition, temp - tcg_ctx, number, label) */
        slot const_i64, 68              /* tcg_const_i64(tcg_ctx, number): temp - tcg_ctx */
        slot const_i32, 69              /* tcg_const_i32(tcg_ctx, number): temp - tcg_ctx */
        slot touched, 70                /* one byte per 2 MiB of physical addresses: not 0, nobody wants to know … */
        slot blocks, 71                 /* … how many */
        slot python_touched, 72         /* void touched(paddr): the first access to such a block */

start:

/* void on_interrupt(uc, intno, cs): UC_HOOK_INTR. Exceptions and INT n go through the guest's IDT. */
        .globl on_interrupt
on_interrupt:
        mov     rdi, rdx
        jmp     [rip + do_interrupt]

/* bool on_invalid(uc, cs): UC_HOOK_INSN_INVALID. #UD does, too. */
        .globl on_invalid
on_invalid:
        sub     rsp, 8
        mov     rdi, rsi
        call    [rip + do_interrupt]
        mov     eax, 1
        add     rsp, 8
        ret

/* void on_trap(uc, intno, cs): UC_HOOK_INTR of a CPU whose exceptions are seen first by its host. What goes through the
   IDT may fault on its way, and leave by longjmp: then `delivering` says so to whoever handles that fault. A fault that
   Python has handled is over; the library would make the next one a double fault. */
        .globl on_trap
on_trap:
.Ltrap: /* what is not global needs no linker */
        sub     rsp, 24
        movzx   eax, sil
        mov     [rsp], eax
        bt      dword ptr [rip + direct], eax
        jc      1f
        mov     rdi, [rip + cpu_env]
        call    [rip + read_eflags]
        mov     eax, eax
        mov     [rip + trap_flags], rax
        mov     edi, [rsp]
        call    [rip + python_trap]
        mov     rax, [rip + cpu_env]
        mov     dword ptr [rax + ENV_OLD_EXCEPTION], -1
        add     rsp, 24
        ret
1:      inc     eax
        mov     [rip + delivering], rax
        mov     rdi, rdx
        call    [rip + do_interrupt]
        mov     qword ptr [rip + delivering], 0
        add     rsp, 24
        ret

/* bool on_invalid_trap(uc, cs): UC_HOOK_INSN_INVALID of such a CPU. */
        .globl on_invalid_trap
on_invalid_trap:
        sub     rsp, 8
        mov     rdx, rsi
        mov     esi, EXCP06_ILLOP
        call    .Ltrap
        mov     eax, 1
        add     rsp, 8
        ret

/* bool exec_interrupt(cs, request), in place of x86_cpu_exec_interrupt: between two blocks, with something wanted.
   True when the program flow or the translations changed. Both a job and an interrupt may be wanted, and the flag that
   brought us here is spent: whatever is not looked at now may not be looked at again. */
        .globl exec_interrupt
exec_interrupt:
        push    rbx
        xor     ebx, ebx
        cmp     dword ptr [rip + jobs_wanted], 0
        je      1f
        call    [rip + python_jobs]
        mov     ebx, 1
1:      mov     rdi, [rip + cpu_env]
        test    dword ptr [rdi + ENV_EFLAGS], IF_MASK
        jz      2f
        test    dword ptr [rdi + ENV_HFLAGS], HF_INHIBIT_IRQ
        jnz     2f
        mov     rax, [rip + gate]
        cmp     dword ptr [rax], 0
        je      2f
        call    [rip + python_take]
        cmp     eax, -1
        je      2f
        mov     ebx, 1
        jl      2f
        mov     rdi, [rip + cpu_env]
        mov     esi, eax
        mov     edx, 1
        call    [rip + do_hardirq]
2:      mov     eax, ebx
        pop     rbx
        ret

/* void *lookup(env), in place of helper_lookup_tb_ptr: which block follows an indirect jump. The shadow of STI ends with
   its instruction, and if that is a RET, the library goes on without looking. */
        .globl lookup
lookup:
        mov     rax, [rip + cpu_state]
        cmp     dword ptr [rax + CS_INTERRUPT_REQUEST], 0
        jne     1f
2:      jmp     [rip + original_lookup]
1:      test    dword ptr [rdi + ENV_EFLAGS], IF_MASK
        jz      2b
        mov     rax, [rip + gate]
        cmp     dword ptr [rax], 0
        je      2b
        mov     rax, [rip + epilogue]
        ret

/* void syscall(env, next_eip_addend), in place of helper_syscall (AMD64 APM 3, SYSCALL). */
        .globl syscall
syscall:
        test    byte ptr [rdi + ENV_EFER], 1
        jz      1f
        test    dword ptr [rdi + ENV_HFLAGS], HF_LMA
        jz      1f
        push    rbx
        sub     rsp, 16
        mov     rbx, rdi
        mov     [rsp], esi
        call    [rip + read_eflags]
        mov     eax, eax
        and     eax, ~RF_MASK
        mov     [rbx + ENV_R11], rax
        movsxd  rcx, dword ptr [rsp]
        add     rcx, [rbx + ENV_EIP]
        mov     [rbx + ENV_RCX], rcx
        /* RFLAGS &= ~FMASK; the library keeps the condition codes and DF apart */
        mov     ecx, [rbx + ENV_FMASK]
        not     ecx
        and     eax, ecx
        mov     ecx, eax
        and     ecx, CC_MASK
        mov     [rbx + ENV_CC_SRC], rcx
        mov     dword ptr [rbx + ENV_CC_OP], CC_OP_EFLAGS
        mov     edx, eax
        shr     edx, 9
        and     edx, 2
        mov     ecx, 1
        sub     ecx, edx
        mov     [rbx + ENV_DF], ecx
        and     eax, ~(CC_MASK | DF_MASK)
        or      eax, 2
        mov     [rbx + ENV_EFLAGS], rax
        mov     edx, [rbx + ENV_HFLAGS]
        mov     rax, [rbx + ENV_LSTAR]
        test    edx, HF_CS64
        cmovz   rax, [rbx + ENV_CSTAR]
        mov     [rbx + ENV_EIP], rax
        mov     rcx, [rbx + ENV_STAR]
        shr     rcx, 32
        and     ecx, 0xfffc
        mov     dword ptr [rbx + ENV_SEG_CS + SELECTOR], ecx
        mov     qword ptr [rbx + ENV_SEG_CS + BASE], 0
        mov     dword ptr [rbx + ENV_SEG_CS + LIMIT], 0xffffffff
        mov     dword ptr [rbx + ENV_SEG_CS + FLAGS], 0xa09b00      /* G L P S code R A */
        add     ecx, 8
        mov     dword ptr [rbx + ENV_SEG_SS + SELECTOR], ecx
        mov     qword ptr [rbx + ENV_SEG_SS + BASE], 0
        mov     dword ptr [rbx + ENV_SEG_SS + LIMIT], 0xffffffff
        mov     dword ptr [rbx + ENV_SEG_SS + FLAGS], 0xc09300      /* G B P S W A */
        and     edx, ~(HF_CPL | HF_ADDSEG)
        or      edx, HF_CS32 | HF_SS32 | HF_CS64
        mov     [rbx + ENV_HFLAGS], edx
        add     rsp, 16
        pop     rbx
        ret
1:      sub     rsp, 8
        mov     esi, EXCP06_ILLOP
        call    [rip + raise_exception]         /* does not return */

/* IN and OUT: the library does no privilege check. Beyond IOPL the TSS's permission map decides; the check raises #GP
   at the instruction, which needs the guest's RIP restored from the translated block we were called from. */
        .macro  io name, size, check, callback
        .globl  \name
\name:
        mov     eax, [rdi + ENV_HFLAGS]
        and     eax, HF_CPL
        mov     ecx, [rdi + ENV_EFLAGS]
        shr     ecx, 12
        and     ecx, 3
        cmp     eax, ecx
        ja      1f
2:      mov     edi, esi
        mov     esi, \size
        jmp     [rip + \callback]
1:      push    rdi
        push    rsi
        push    rdx
        mov     rsi, [rsp + 24]
        mov     rdi, [rip + cpu_state]
        mov     edx, 1
        call    [rip + restore_state]
        mov     rdi, [rsp + 16]
        mov     esi, [rsp + 8]
        call    [rip + \check]
        pop     rdx
        pop     rsi
        pop     rdi
        jmp     2b
        .endm

        io      inb, 1, check_iob, python_in
        io      inw, 2, check_iow, python_in
        io      inl, 4, check_iol, python_in
        io      outb, 1, check_iob, python_out
        io      outw, 2, check_iow, python_out
        io      outl, 4, check_iol, python_out

/* void cpuid(env) */
        .globl cpuid
cpuid:
        sub     rsp, 8
        mov     eax, [rdi + ENV_RAX]
        mov     [rsp], eax
        mov     eax, [rdi + ENV_RCX]
        mov     [rsp + 4], eax
        call    [rip + original_cpuid]
        mov     edi, [rsp]
        mov     esi, [rsp + 4]
        add     rsp, 8
        jmp     [rip + python_cpuid]

/* void rdmsr(env), void wrmsr(env): what AMD64 has at 0xc0000000 is hot and the library's; the rest is asked for. */
        .globl rdmsr
rdmsr:
        mov     eax, [rdi + ENV_RCX]
        cmp     eax, 0xc0000000
        jae     1f
        push    rdi
        mov     edi, eax
        call    [rip + python_rdmsr]
        pop     rdi
        test    eax, eax
        jz      1f
        mov     eax, [rip + value]
        mov     [rdi + ENV_RAX], rax
        mov     eax, [rip + value + 4]
        mov     [rdi + ENV_RDX], rax
        ret
1:      jmp     [rip + original_rdmsr]

        .globl wrmsr
wrmsr:
        mov     eax, [rdi + ENV_RCX]
        cmp     eax, 0xc0000000
        jae     1f
        mov     ecx, [rdi + ENV_RAX]
        mov     esi, [rdi + ENV_RDX]
        shl     rsi, 32
        or      rsi, rcx
        push    rdi
        mov     edi, eax
        call    [rip + python_wrmsr]
        pop     rdi
        test    eax, eax
        jz      1f
        ret
1:      jmp     [rip + original_wrmsr]

/* void protect_code(uc, ram_address): a page gets its first translation. Mark it, and have every TLB entry that leads
   there take the slow path for stores. */
        .globl protect_code
protect_code:
        mov     rax, rsi
        shr     rax, PAGE_SHIFT
        cmp     rax, [rip + code_pages]
        jae     1f
        mov     rcx, [rip + code_map]
        mov     byte ptr [rcx + rax], 1
        mov     rdi, [rip + cpu_state]
        add     rsi, [rip + ram]
        mov     edx, 1 << PAGE_SHIFT
        jmp     [rip + tlb_reset_dirty]
1:      ret

/* void unprotect_code(uc, ram_address): a page lost its last translation. */
        .globl unprotect_code
unprotect_code:
        shr     rsi, PAGE_SHIFT
        cmp     rsi, [rip + code_pages]
        jae     1f
        mov     rcx, [rip + code_map]
        mov     byte ptr [rcx + rsi], 0
1:      ret

/* void page_written(uc, pages, start, len, retaddr), in place of tb_invalidate_phys_page_fast: note where. */
        .globl page_written
page_written:
        mov     [rip + last_write], rdx
        jmp     [rip + invalidate_fast]

/* void set_dirty(cs, vaddr): after such a store, take the fast path from now on, unless code is left in the page. */
        .globl set_dirty
set_dirty:
        mov     rax, [rip + last_write]
        shr     rax, PAGE_SHIFT
        cmp     rax, [rip + code_pages]
        jae     1f
        mov     rcx, [rip + code_map]
        cmp     byte ptr [rcx + rax], 0
        jne     2f
1:      jmp     [rip + original_set_dirty]
2:      ret

/* bool fill(cs, vaddr, size, access, …), in place of x86_cpu_tlb_fill: note what for. */
        .globl fill
fill:
        mov     [rip + access], ecx
        mov     [rip + fill_address], rsi
        mov     rax, [rsp + 8]
        mov     [rip + fill_return], rax
        jmp     [rip + original_fill]

/* void set_page(cs, vaddr, paddr, attrs, prot, …), in place of tlb_set_page_with_attrs. The library keeps all stores
   to a page slow while its TLB entry can execute, whether there is code or not; and a kernel that boots maps its data
   executable: 22 million slow stores. So an entry made for data can only execute if it cannot store.
   A host whose guest keeps its own page tables cannot trust them: what they lead to beyond the guest's memory becomes a
   page fault here, where every translation has to pass.
   And since it has to, the first access to a block of RAM is seen here, just before it is made. */
        .globl set_page
set_page:
        cmp     rdx, [rip + physical_limit]
        jae     2f
3:      mov     rax, rdx
        shr     rax, BLOCK_SHIFT
        cmp     rax, [rip + blocks]
        jae     6f
        add     rax, [rip + touched]
        cmp     byte ptr [rax], 0
        je      7f
6:      cmp     dword ptr [rip + access], MMU_INST_FETCH
        je      1f
        test    r8d, PAGE_WRITE
        jz      1f
        and     r8d, ~PAGE_EXEC
1:      jmp     [rip + original_set_page]
2:      mov     rax, [rip + fill_address]
        cmp     eax, [rip + reserved]
        jae     3b
        sub     rsp, 8                          /* does not return */
        mov     rdi, [rip + cpu_env]
        mov     [rdi + ENV_CR2], rax
        and     eax, (1 << PAGE_SHIFT) - 1
        add     rdx, rax
        mov     [rip + beyond], rdx
        xor     edx, edx
        cmp     dword ptr [rip + access], MMU_DATA_STORE
        jne     4f
        or      edx, ERROR_WRITE
4:      cmp     r9d, MMU_USER_IDX
        jne     5f
        or      edx, ERROR_USER
5:      mov     esi, EXCP0E_PAGE
        mov     rcx, [rip + fill_return]
        call    [rip + raise_error]
7:      mov     byte ptr [rax], 1
        push    rdi
        push    rsi
        push    rdx
        push    rcx
        push    r8
        push    r9
        sub     rsp, 8
        mov     rdi, rdx
        call    [rip + python_touched]
        add     rsp, 8
        pop     r9
        pop     r8
        pop     rcx
        pop     rdx
        pop     rsi
        pop     rdi
        jmp     6b

/* void iret(env, shift, next_eip), in place of helper_iret_protected: the library lets anybody return to virtual-8086
   mode, with the I/O privilege level of his choice. To do so takes level 0; others get a #GP. */
        .globl iret
iret:
        test    dword ptr [rdi + ENV_HFLAGS], HF_CPL
        jz      4f
        cmp     esi, 1
        jne     4f
        push    rdi
        push    rsi
        push    rdx
        mov     rsi, [rdi + ENV_RSP]
        test    dword ptr [rdi + ENV_HFLAGS], HF_CS64
        jnz     3f
        test    dword ptr [rdi + ENV_HFLAGS], HF_SS32
        jnz     2f
        movzx   esi, si
2:      add     esi, [rdi + ENV_SEG_SS + BASE]
3:      add     rsi, 8
        mov     rdx, [rsp + 24]
        call    [rip + load_data]
        pop     rdx
        pop     rsi
        pop     rdi
        test    eax, VM_MASK
        jnz     5f
4:      jmp     [rip + original_iret]
5:      mov     esi, EXCP0D_GPF
        xor     edx, edx
        mov     rcx, [rsp]
        jmp     [rip + raise_error]             /* does not return */

/* void mb(tcg_ctx, type), in place of tcg_gen_mb; and, in place of tcg_gen_atomic_…, the same with a fence behind. For a
   single virtual CPU the library translates MFENCE to nothing and locked instructions to plain ones. But a guest's
   fences are also for the devices, who are on other CPUs of the host's: "I moved the index; do you sleep?" The
   instructions need not be atomic (no device changes what the guest does), but their fence has to be there. */
        .globl mb
mb:
        mov     edx, esi
        mov     esi, INDEX_OP_MB
        jmp     [rip + gen_op1]

        .macro  fenced name
        .globl  \name
\name:
        push    rbx
        mov     rbx, rdi
        sub     rsp, 8
        push    [rsp + 24]                      /* the seventh argument, which one of them has */
        call    [rip + original_\name]
        add     rsp, 16
        mov     rdi, rbx
        pop     rbx
        mov     esi, INDEX_OP_MB
        mov     edx, MO_ALL_BAR_SC
        jmp     [rip + gen_op1]
        .endm

        fenced  xchg
        fenced  cmpxchg
        fenced  fetch_add
        fenced  fetch_and
        fenced  fetch_or
        fenced  fetch_xor
        fenced  add_fetch
        fenced  and_fetch
        fenced  or_fetch
        fenced  xor_fetch

/* void gen_call(tcg_ctx, function, result, count, arguments), in place of tcg_gen_callN, by which calls of helpers are
   translated. Each block begins with one, helper_check_exit_request, that nearly always finds nothing: up to a tenth of
   a guest's time. What it looks at is looked at in translated code first, and it is called only if there is something.
   Its arguments are made anew, since what was in temporaries is lost at a branch. */
        .globl gen_call
gen_call:
        cmp     rsi, [rip + check_exit]
        je      1f
        jmp     [rip + original_call]
1:      push    rbx
        push    r12
        push    r13
        sub     rsp, 16
        mov     rbx, rdi
        call    [rip + new_label]
        mov     r12, rax
        mov     rdi, rbx
        mov     esi, TCG_TYPE_I32
        xor     edx, edx
        call    [rip + new_temp]
        mov     r13, rax
        mov     rdi, rbx
        mov     esi, INDEX_OP_LD_I32
        mov     rdx, r13
        mov     rcx, [rbx + CTX_ENV]
        add     rcx, rbx
        mov     r8, ENV_ICOUNT_DECR
        call    [rip + gen_op3]
        mov     rdi, rbx
        mov     esi, TCG_COND_GE
        mov     rdx, r13
        sub     rdx, rbx
        xor     ecx, ecx
        mov     r8, r12
        call    [rip + gen_branch]
        mov     rdi, rbx
        mov     rsi, r13
        call    [rip + free_temp]
        mov     rdi, rbx
        mov     rsi, [rbx + CTX_UC]
        call    [rip + const_i64]
        add     rax, rbx
        mov     [rsp], rax
        mov     rdi, rbx
        xor     esi, esi
        call    [rip + const_i32]
        add     rax, rbx
        mov     [rsp + 8], rax
        mov     rdi, rbx
        mov     rsi, [rip + check_exit]
        xor     edx, edx
        mov     ecx, 2
        mov     r8, rsp
        call    [rip + original_call]
        mov     rdi, rbx
        mov     rsi, [rsp + 8]
        call    [rip + free_temp]
        mov     rdi, rbx
        mov     rsi, [rsp]
        call    [rip + free_temp]
        or      byte ptr [r12], LABEL_PRESENT
        mov     rdi, rbx
        mov     esi, INDEX_OP_SET_LABEL
        mov     rdx, r12
        add     rsp, 16
        pop     r13
        pop     r12
        pop     rbx
        jmp     [rip + gen_op1]

/* void nothing(): in place of tlb_reset_dirty_by_vaddr, which walked the whole TLB for every new block; protect_code
   does it once a page. */
        .globl nothing
nothing:
        ret

        .section .note.GNU-stack, "", @progbits
