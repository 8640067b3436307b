// What watched processes read from and write to block devices, and how long each request took.
//
// The kernel makes one request of neighbouring pieces (bios), whoever submitted them, and may issue it from a thread of
// its own: so each piece is remembered with its submitter, and counted when its request is issued. Not when it completes:
// that is in an interrupt, where the kernel may pass a program over, and only a delay is lost then. What a process wrote
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

// The size of a piece, for whoever submitted it, where that is somebody who is watched.
static __always_inline void settle(u64 bio, u32 size_offset, u64 when_read, u64 when_written, u32 *owner) {
    u32 *slot = submitted.lookup(&bio);
    if (!slot)
        return;
    *owner = *slot;
    struct usage *used = usage.lookup(slot);
    u64 size = u32_at(bio, size_offset);
    if (used) {
        used->read_bytes += size & when_read;
        used->written_bytes += size & when_written;
    }
    submitted.delete(&bio);
}

// block_rq_issue(rq): to the device, which may send it back because its queue is full: then it is issued once more, and
// its pieces have counted already. The time of a request counts for one of those who wait for it.
int on_issue(struct bpf_raw_tracepoint_args *context) {
    u64 request = context->args[SUBJECT];
    struct layout *where = known_layout();
    count_run();
    if (!where)
        return 0;
    u32 operation = u32_at(request, OFFSET(where->request_flags, struct request, cmd_flags)) & OPERATION_MASK;
    u64 when_read = operation == REQ_OP_READ ? -1 : 0, when_written = operation == REQ_OP_WRITE ? -1 : 0;
    u64 first = u64_at(request, OFFSET(where->request_bio, struct request, bio)), bio = first;
    u32 size_offset = OFFSET(where->bio_size, struct bio, bi_iter.bi_size), owner = SLOTS;
    for (u32 index = 0; index < MOST_BIOS && bio; index++) {
        settle(bio, size_offset, when_read, when_written, &owner);
        bio = u64_at(bio, offsetof(struct bio, bi_next));
    }
    struct issue *before = issued.lookup(&request);
    if (owner < SLOTS) {
        struct issue now = {.since_ns = bpf_ktime_get_ns(), .bio = first, .slot = owner};
        issued.update(&request, &now);
    } else if (before && before->bio != first) {
        issued.delete(&request); // of somebody else, and its completion went unseen
    }
    return 0;
}

// block_rq_complete(rq, error, nr_bytes): in an interrupt, on whichever core.
int on_complete(struct bpf_raw_tracepoint_args *context) {
    u64 request = context->args[0];
    struct issue *issue = issued.lookup(&request);
    count_run();
    if (!issue)
        return 0;
    struct usage *used = usage.lookup(&issue->slot);
    u32 bucket = bucket_of(bpf_ktime_get_ns() - issue->since_ns);
    issued.delete(&request);
    if (used && bucket < BUCKETS)
        used->io_delay[bucket] += 1;
    return 0;
}
