// Who changed whose affinity: calls of sched_setaffinity that succeeded.
//
// By the end of every system call, because not every kernel has a tracepoint for each of them: what costs nothing is
// looked at first.
#include "probe.h"
#include <asm/ptrace.h>
#include <asm/unistd.h>

#if defined(__x86_64__)
#define CALL_NUMBER orig_ax
#define FIRST_ARGUMENT di
#elif defined(__aarch64__)
#define CALL_NUMBER syscallno
#define FIRST_ARGUMENT orig_x0
#else
#error "the probe knows the registers of x86-64 and arm64 alone"
#endif

// Number 0 is the caller; others count in the caller's pid namespace, and are understood only in ours.
static __always_inline u32 target_of(u32 number, struct layout *where) {
    struct bpf_pidns_info here = {};
    if (!number)
        return bpf_get_current_pid_tgid();
    if (bpf_get_ns_current_pid_tgid(where->namespace_device, where->namespace_inode, &here, sizeof(here)))
        return 0;
    return number;
}

// sys_exit(regs, ret).
int on_call_end(struct bpf_raw_tracepoint_args *context) {
    u64 registers = context->args[0];
    if (context->args[1] != 0)
        return 0;
    count_run();
    if (u32_at(registers, offsetof(struct pt_regs, CALL_NUMBER)) != __NR_sched_setaffinity)
        return 0;
    struct layout *where = known_layout();
    if (!where)
        return 0;
    u32 number = target_of(u32_at(registers, offsetof(struct pt_regs, FIRST_ARGUMENT)), where);
    struct thread *thread = threads.lookup(&number);
    if (!thread)
        return 0;
    struct change change = {.caller = bpf_get_current_pid_tgid() >> 32, .slot = thread->slot, .thread = number};
    bpf_get_current_comm(change.caller_name, sizeof(change.caller_name));
    changes.push(&change, BPF_EXIST); // the oldest one makes room
    return 0;
}
