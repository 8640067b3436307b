// What the programs share: their maps and, byte for byte as edged/probe/kernel.py reads them, what is in these.
//
// scheduler.c, affinity.c and blocks.c are compiled as one text, in this order.
#pragma once
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/sched.h>
#include <linux/version.h>

#define BUCKETS 27
#define SLOTS 64
#define THREADS 4096
#define REQUESTS 4096
#define CHANGES 256
#define NAME_BYTES 16

// What a thread of a watched process does. It is RUNNABLE while it waits for a core, WAITING while nothing but the
// kernel can wake it: for the disk, mostly.
enum state { UNKNOWN, RUNNING, RUNNABLE, SLEEPING, WAITING };

struct thread {
    u64 since_ns;
    u64 ran_ns; // until then, by the scheduler's account
    u32 slot;
    u32 state;
    u32 core;
    u32 unused;
};

// Of the process in one slot, on one core, since the programs were loaded.
struct usage {
    u64 on_cpu_ns;
    u64 runnable_ns;
    u64 sleeping_ns;
    u64 waiting_ns;
    u64 stolen_ns; // on its core, which a hypervisor or an interrupt had meanwhile
    u64 migrations;
    u64 read_bytes;
    u64 written_bytes;
    u64 run_queue[BUCKETS];
    u64 io_delay[BUCKETS];
};

// What the loader found out about this kernel: where the few fields lie that are read from its structures, as the
// kernel itself says (BTF), 0 for where the headers say; and the pid namespace in which threads are numbered.
struct layout {
    u32 task_pid;
    u32 task_tgid;
    u32 task_ran;
    u32 request_bio;
    u32 request_flags;
    u32 bio_size;
    u64 namespace_device;
    u64 namespace_inode;
};

// Somebody set the affinity of a watched thread.
struct change {
    u32 caller;
    u32 slot;
    u32 thread;
    u32 unused;
    char caller_name[NAME_BYTES];
};

// A request of a watched process that is with the device, known by its first piece: its address is used again.
struct issue {
    u64 since_ns;
    u64 bio;
    u32 slot;
    u32 unused;
};

struct checked {
    u64 right;
    u64 wrong;
};

BPF_ARRAY(layout, struct layout, 1);
BPF_HASH(watched, u32, u32, SLOTS);            // process → slot
BPF_HASH(threads, u32, struct thread, THREADS); // thread → what it does
BPF_PERCPU_ARRAY(usage, struct usage, SLOTS);
BPF_PERCPU_ARRAY(runs, u64, 1); // of all programs
BPF_PERCPU_ARRAY(checked, struct checked, 1);
BPF_QUEUE(changes, struct change, CHANGES);
BPF_TABLE("lru_hash", u64, u32, submitted, REQUESTS); // bio → slot
BPF_TABLE("lru_hash", u64, struct issue, issued, REQUESTS); // request → since when, and whose

#define OFFSET(known, type, field) ((known) ? (known) : offsetof(type, field))

static __always_inline u32 u32_at(u64 structure, u32 offset) {
    u32 number = 0;
    bpf_probe_read_kernel(&number, sizeof(number), (void *)structure + offset);
    return number;
}

static __always_inline u64 u64_at(u64 structure, u32 offset) {
    u64 number = 0;
    bpf_probe_read_kernel(&number, sizeof(number), (void *)structure + offset);
    return number;
}

// Delays are counted by powers of two: bucket i begins at 2^i microseconds, the first one at 0.
static __always_inline u32 bucket_of(u64 nanoseconds) {
    u64 microseconds = nanoseconds / 1000;
    u32 bucket = 0;
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) {
        if (microseconds >> step) {
            microseconds >>= step;
            bucket += step;
        }
    }
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}
