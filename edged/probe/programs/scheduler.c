// Who computes where, who waits for a core, who sleeps: from the scheduler's tracepoints.
//
// A thread is known from the moment its process is watched, or from its first wake-up; it is forgotten when it ends.
// In all of these places the kernel holds the lock of the thread's run queue, so nobody else changes its entry.
#include "probe.h"

#define DEAD 0x80 // the state of a thread that will never run again; headers call it TASK_DEAD
#define LONGEST_TICK_NS 10000000

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
    return u32_at(task, OFFSET(where->task_pid, struct task_struct, pid));
}

static __always_inline u32 process_of(u64 task, struct layout *where) {
    return u32_at(task, OFFSET(where->task_tgid, struct task_struct, tgid));
}

// How long it has computed, as the scheduler counts: without what was stolen from it. Exact whenever it is given a core
// or leaves it.
static __always_inline u64 ran_by(u64 task, struct layout *where) {
    return u64_at(task, OFFSET(where->task_ran, struct task_struct, se.sum_exec_runtime));
}

static __always_inline u32 kernel_state_of(struct bpf_raw_tracepoint_args *context) {
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 18, 0)
    return context->args[3];
#elif LINUX_VERSION_CODE >= KERNEL_VERSION(5, 14, 0)
    return u32_at(context->args[1], offsetof(struct task_struct, __state));
#else
    return u32_at(context->args[1], offsetof(struct task_struct, state));
#endif
}

static __always_inline u32 state_after(u64 is_preempted, u32 kernel_state) {
    if (is_preempted || kernel_state == TASK_RUNNING)
        return RUNNABLE;
    return kernel_state & TASK_UNINTERRUPTIBLE ? WAITING : SLEEPING;
}

// What the thread did until now counts, and from now on it does something else. What it computed counts by the
// scheduler's account, whatever it is believed to do: not every switch is shown to the programs.
static __always_inline void turn(struct thread *thread, u64 task, u32 state, struct layout *where) {
    struct usage *used = usage.lookup(&thread->slot);
    u64 now = bpf_ktime_get_ns();
    u64 passed = now - thread->since_ns;
    u64 account = ran_by(task, where);
    u64 ran = account - thread->ran_ns;
    // More than there was time for, or less than before: the thread's end was not shown, and another has its number.
    if (ran > passed + LONGEST_TICK_NS)
        ran = thread->state == RUNNING ? passed : 0;
    u64 paused = passed > ran ? passed - ran : 0;
    if (used && thread->state != UNKNOWN)
        used->on_cpu_ns += ran;
    if (used && thread->state == RUNNING && state != RUNNING)
        used->stolen_ns += paused;
    else if (used && thread->state == RUNNABLE)
        used->runnable_ns += paused;
    else if (used && thread->state == SLEEPING)
        used->sleeping_ns += paused;
    else if (used && thread->state == WAITING)
        used->waiting_ns += paused;
    if (used && thread->state == RUNNABLE && state == RUNNING) {
        u32 bucket = bucket_of(paused);
        if (bucket < BUCKETS)
            used->run_queue[bucket] += 1;
    }
    thread->state = state;
    thread->since_ns = now;
    thread->ran_ns = account;
}

// The current thread: the kernel has not left it yet.
static __always_inline void leave(u64 is_preempted, u32 kernel_state, struct layout *where) {
    u32 number = bpf_get_current_pid_tgid();
    struct thread *thread = threads.lookup(&number);
    if (!thread)
        return;
    turn(thread, bpf_get_current_task(), state_after(is_preempted, kernel_state), where);
    if (kernel_state & DEAD)
        threads.delete(&number);
}

static __always_inline void enter(u64 task, struct layout *where) {
    u32 number = thread_of(task, where);
    struct thread *thread = threads.lookup(&number);
    if (!thread)
        return;
    turn(thread, task, RUNNING, where);
    thread->core = bpf_get_smp_processor_id();
}

// sched_switch(preempt, prev, next, prev_state). Most switches concern nobody who is watched: these cost two lookups and
// nothing else.
int on_switch(struct bpf_raw_tracepoint_args *context) {
    struct layout *where = known_layout();
    count_run();
    if (!where)
        return 0;
    leave(context->args[0], kernel_state_of(context), where);
    enter(context->args[2], where);
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
        turn(thread, context->args[0], RUNNABLE, where);
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
    bool is_account = ran_by(task, where) <= 2 * bpf_ktime_get_ns(); // their clocks differ a little, a pointer by far
    if (thread_of(task, where) == (u32)told && process_of(task, where) == told >> 32 && is_account)
        count->right += 1;
    else
        count->wrong += 1;
    return 0;
}
