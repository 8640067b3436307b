// Who computes where, who waits for a core, who sleeps: from the scheduler's tracepoints.
//
// A thread is known from the moment its process is watched, or from its first wake-up; it is forgotten when it ends.
// In all of these places the kernel holds the lock of the thread's run queue, so nobody else changes its entry.
#include "probe.h"

#define DEAD 0x80 // the state of a thread that will never run again; headers call it TASK_DEAD

static __always_inline void count_run(void) {
    u32 zero = 0;
    u64 *count = runs.lookup(&zero);
    if (count)
        *count += 1;
}

static __always_inline struct layout *known_layout(void) {
    u32 zero = 0;
    return layout.lookup(&zero);
}

static __always_inline u32 thread_of(u64 task, struct layout *where) {
    return number_at(task, OFFSET(where->task_pid, struct task_struct, pid));
}

static __always_inline u32 process_of(u64 task, struct layout *where) {
    return number_at(task, OFFSET(where->task_tgid, struct task_struct, tgid));
}

static __always_inline u32 kernel_state_of(struct bpf_raw_tracepoint_args *context) {
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 18, 0)
    return context->args[3];
#elif LINUX_VERSION_CODE >= KERNEL_VERSION(5, 14, 0)
    return number_at(context->args[1], offsetof(struct task_struct, __state));
#else
    return number_at(context->args[1], offsetof(struct task_struct, state));
#endif
}

static __always_inline u32 state_after(u64 is_preempted, u32 kernel_state) {
    if (is_preempted || kernel_state == TASK_RUNNING)
        return RUNNABLE;
    return kernel_state & TASK_UNINTERRUPTIBLE ? WAITING : SLEEPING;
}

// What the thread did until now counts, and from now on it does something else.
static __always_inline void turn(struct thread *thread, u32 state) {
    struct usage *used = usage.lookup(&thread->slot);
    u64 now = bpf_ktime_get_ns();
    u64 passed = now - thread->since_ns;
    if (used && thread->state == RUNNING)
        used->on_cpu_ns += passed;
    else if (used && thread->state == RUNNABLE)
        used->runnable_ns += passed;
    else if (used && thread->state == SLEEPING)
        used->sleeping_ns += passed;
    else if (used && thread->state == WAITING)
        used->waiting_ns += passed;
    if (used && thread->state == RUNNABLE && state == RUNNING) {
        u32 bucket = bucket_of(passed);
        if (bucket < BUCKETS)
            used->run_queue[bucket] += 1;
    }
    thread->state = state;
    thread->since_ns = now;
}

static __always_inline void leave(u32 number, u64 is_preempted, u32 kernel_state) {
    struct thread *thread = threads.lookup(&number);
    if (!thread)
        return;
    turn(thread, state_after(is_preempted, kernel_state));
    if (kernel_state & DEAD)
        threads.delete(&number);
}

static __always_inline void enter(u32 number) {
    struct thread *thread = threads.lookup(&number);
    if (!thread)
        return;
    turn(thread, RUNNING);
    thread->core = bpf_get_smp_processor_id();
}

// sched_switch(preempt, prev, next, prev_state). The current task is still `prev`; number 0 is the core's idle task. Most
// switches concern nobody who is watched: these cost two lookups and nothing else.
int on_switch(struct bpf_raw_tracepoint_args *context) {
    struct layout *where = known_layout();
    count_run();
    if (!where)
        return 0;
    u32 last = bpf_get_current_pid_tgid();
    u32 next = thread_of(context->args[2], where);
    if (last)
        leave(last, context->args[0], kernel_state_of(context));
    if (next)
        enter(next);
    return 0;
}

// sched_wakeup(p): also of threads that were about to sleep and did not.
int on_wakeup(struct bpf_raw_tracepoint_args *context) {
    struct layout *where = known_layout();
    count_run();
    if (!where)
        return 0;
    u32 number = thread_of(context->args[0], where);
    struct thread *thread = threads.lookup(&number);
    if (thread && thread->state >= SLEEPING)
        turn(thread, RUNNABLE);
    return 0;
}

// sched_wakeup_new(p): a thread begins, maybe one of a watched process.
int on_new(struct bpf_raw_tracepoint_args *context) {
    struct layout *where = known_layout();
    count_run();
    if (!where)
        return 0;
    u32 number = thread_of(context->args[0], where);
    u32 process = process_of(context->args[0], where);
    u32 *slot = watched.lookup(&process);
    if (!slot)
        return 0;
    struct thread thread = {.since_ns = bpf_ktime_get_ns(), .slot = *slot, .state = RUNNABLE};
    threads.update(&number, &thread);
    return 0;
}

// sched_migrate_task(p, dest_cpu).
int on_migration(struct bpf_raw_tracepoint_args *context) {
    struct layout *where = known_layout();
    count_run();
    if (!where)
        return 0;
    u32 number = thread_of(context->args[0], where);
    struct thread *thread = threads.lookup(&number);
    if (!thread)
        return 0;
    struct usage *used = usage.lookup(&thread->slot);
    if (used)
        used->migrations += 1;
    return 0;
}

// sched_switch again, for a moment after loading: are the current task's numbers where they are looked for?
int check_layout(struct bpf_raw_tracepoint_args *context) {
    u32 zero = 0;
    struct layout *where = known_layout();
    struct checked *count = checked.lookup(&zero);
    if (!where || !count)
        return 0;
    u64 told = bpf_get_current_pid_tgid();
    u64 task = context->args[1];
    if (thread_of(task, where) == (u32)told && process_of(task, where) == told >> 32)
        count->right += 1;
    else
        count->wrong += 1;
    return 0;
}
