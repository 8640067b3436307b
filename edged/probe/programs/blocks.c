// What watched processes read from and write to block devices, and how long each request took.
//
// The kernel makes one request of neighbouring pieces (bios), whoever submitted them, and may issue it from a thread of
// its own: so each piece is remembered with its submitter, and counted when its request completes. What a process wrote
// into the page cache and did not flush, the kernel writes out later: that is nobody's here.
#include "probe.h"

#define OPERATION_MASK 0xff
#define MOST_BIOS 32 // of one request; further ones count for nobody

// Up to Linux 5.10 the queue came before what is meant.
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 11, 0)
#define SUBJECT 0
#else
#define SUBJECT 1
#endif

// block_bio_queue(bio), and block_split(bio, sector) for the first part of one that is too large: in the context of
// whoever wants it. The address of a finished one is used again.
int on_submit(struct bpf_raw_tracepoint_args *context) {
    u64 bio = context->args[SUBJECT];
    u32 process = bpf_get_current_pid_tgid() >> 32;
    u32 *slot = watched.lookup(&process);
    count_run();
    if (slot)
        submitted.update(&bio, slot);
    else
        submitted.delete(&bio);
    return 0;
}

// block_rq_issue(rq): to the device, which may send it back because its queue is full: then it is issued once more.
int on_issue(struct bpf_raw_tracepoint_args *context) {
    u64 request = context->args[SUBJECT];
    u64 now = bpf_ktime_get_ns();
    count_run();
    issued.update(&request, &now);
    return 0;
}

// The size of a piece, for whoever submitted it, where that is somebody who is watched.
static __always_inline void settle(u64 bio, u32 size_offset, u64 when_read, u64 when_written, u32 *owner) {
    u32 *slot = submitted.lookup(&bio);
    if (!slot)
        return;
    *owner = *slot;
    struct usage *used = usage.lookup(slot);
    u64 size = number_at(bio, size_offset);
    if (used) {
        used->read_bytes += size & when_read;
        used->written_bytes += size & when_written;
    }
    submitted.delete(&bio);
}

// block_rq_complete(rq, error, nr_bytes): in an interrupt, on whichever core; all pieces are still there. The time of a
// request counts once, for one of those who waited for it.
int on_complete(struct bpf_raw_tracepoint_args *context) {
    u64 request = context->args[0];
    struct layout *where = known_layout();
    u64 *since = issued.lookup(&request);
    count_run();
    if (!where || !since)
        return 0;
    u64 began = *since;
    issued.delete(&request);
    u32 operation = number_at(request, OFFSET(where->request_flags, struct request, cmd_flags)) & OPERATION_MASK;
    u64 when_read = operation == REQ_OP_READ ? -1 : 0, when_written = operation == REQ_OP_WRITE ? -1 : 0;
    u64 bio = pointer_at(request, OFFSET(where->request_bio, struct request, bio));
    u32 size_offset = OFFSET(where->bio_size, struct bio, bi_iter.bi_size), owner = SLOTS;
    for (u32 index = 0; index < MOST_BIOS && bio; index++) {
        settle(bio, size_offset, when_read, when_written, &owner);
        bio = pointer_at(bio, offsetof(struct bio, bi_next));
    }
    struct usage *used = usage.lookup(&owner);
    u32 bucket = bucket_of(bpf_ktime_get_ns() - began);
    if (used && bucket < BUCKETS)
        used->io_delay[bucket] += 1;
    return 0;
}
