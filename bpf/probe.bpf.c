//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR MIT */

/*
 * Who reads which blocks of a block device and for how long they wait, and who
 * begins to listen. The rest of the repository is under the Apache License; the
 * kernel lends some helpers only to programs under the GPL, so what is in this
 * file and in kernel.h may be used under either the GPL, version 2, or the MIT
 * license.
 *
 * A read is told of when it is queued, in the context of the process that causes
 * it (read-ahead included), and once more when it completes. Nobody is woken: the
 * reader of the ring buffer looks at it from time to time.
 */
#include "kernel.h"

char __license[] SEC("license") = "Dual MIT/GPL";

enum kind { READ = 1, DONE = 2, LISTEN = 3 };

enum flags {
	KERNEL = 1,    /* a thread of the kernel has queued it */
	READAHEAD = 2, /* the kernel's read-ahead has queued it */
};

struct read {
	enum kind kind;
	enum flags flags;
	__u64 at;     /* CLOCK_MONOTONIC, ns */
	__u64 bio;    /* its address: what is under way has one of its own */
	__u64 sector; /* of the whole disk, 512 bytes each */
	__u32 bytes;
	__u32 disk; /* the whole disk, major << 20 | minor */
	__u32 pid;
	__u32 mnt_ns; /* inode of its mount namespace */
	__u8 comm[16];
};

struct done {
	enum kind kind;
	__u64 at;  /* CLOCK_MONOTONIC, ns */
	__u64 bio; /* of a read that may have been told of */
};

struct listen {
	enum kind kind;
	__u32 family;
	__u64 at; /* CLOCK_MONOTONIC, ns */
	__u32 port;
	__u32 pid;
	__u32 mnt_ns;
	__u32 net_ns; /* of the socket */
	__u8 addr[16];
	__u8 comm[16];
};

union event {
	struct read read;
	struct done done;
	struct listen listen;
};

/* The sectors of a disk that are watched: from first up to, but not, end. */
struct span {
	__u64 first, end;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u32); /* the whole disk */
	__type(value, struct span);
} disks SEC(".maps");

/* Mount namespaces whose processes count, if only_containers is set. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u8);
} containers SEC(".maps");

const volatile bool only_containers = 0;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
	__type(value, union event); /* one of these, each with its own size */
} ring SEC(".maps");

/* How many reads and listens found no room. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

static __always_inline void lose(void)
{
	__u32 zero = 0;
	__u64 *n = bpf_map_lookup_elem(&lost, &zero);

	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline void send(void *event, __u64 size)
{
	if (bpf_ringbuf_output(&ring, event, size, BPF_RB_NO_WAKEUP))
		lose();
}

/* counted tells whether what the processes of a mount namespace do counts. */
static __always_inline bool counted(__u32 mnt_ns)
{
	return !only_containers || bpf_map_lookup_elem(&containers, &mnt_ns);
}

#define OP_MASK 0xff /* include/linux/blk_types.h; REQ_OP_READ is 0 */
#define PF_KTHREAD 0x00200000

enum req_flag_bits { __REQ_RAHEAD };

static __always_inline bool is_readahead(__u32 opf)
{
	return opf >> __builtin_preserve_enum_value(*(enum req_flag_bits *)__REQ_RAHEAD, 1) & 1;
}

SEC("tp_btf/block_bio_queue")
int bio_queue(__u64 *ctx)
{
	struct bio *bio = (struct bio *)ctx[0];
	struct task_struct *task;
	struct span *span;
	struct read r = { .kind = READ };

	if ((bio->bi_opf & OP_MASK) || !bio->bi_iter.bi_size)
		return 0;
	/* The sector of a partition's bio has been made one of the disk by now. */
	r.disk = bio->bi_bdev->bd_disk->part0->bd_dev;
	r.sector = bio->bi_iter.bi_sector;
	span = bpf_map_lookup_elem(&disks, &r.disk);
	if (!span || r.sector >= span->end || r.sector + (bio->bi_iter.bi_size >> 9) <= span->first)
		return 0;
	task = bpf_get_current_task_btf();
	r.mnt_ns = task->nsproxy->mnt_ns->ns.inum;
	if (!counted(r.mnt_ns))
		return 0;

	r.bytes = bio->bi_iter.bi_size;
	r.pid = task->tgid;
	bpf_probe_read_kernel(r.comm, sizeof(r.comm), task->group_leader->comm);
	if (task->flags & PF_KTHREAD)
		r.flags |= KERNEL;
	if (is_readahead(bio->bi_opf))
		r.flags |= READAHEAD;
	r.bio = ctx[0];
	r.at = bpf_ktime_get_ns();
	send(&r, sizeof(r));
	return 0;
}

/* watched tells whether a bio is a read of a disk that is watched. */
static __always_inline bool watched(struct bio *bio)
{
	__u32 disk;

	if (bio->bi_opf & OP_MASK)
		return 0;
	disk = bio->bi_bdev->bd_disk->part0->bd_dev;
	return bpf_map_lookup_elem(&disks, &disk);
}

/*
 * send_done is a function of its own, and neither static nor inlined, so that the
 * verifier looks at it once and not for each round of the loop below.
 */
__attribute__((noinline)) int send_done(struct done *d)
{
	/* If there is no room, nobody learns for how long a read has waited. */
	if (d)
		bpf_ringbuf_output(&ring, d, sizeof(*d), BPF_RB_NO_WAKEUP);
	return 0;
}

/* Disks that are given bios, such as those of device-mapper, tell of each. */
SEC("tp_btf/block_bio_complete")
int bio_complete(__u64 *ctx)
{
	struct done d = { .kind = DONE };

	if (!watched((struct bio *)ctx[1]))
		return 0;
	d.bio = ctx[1];
	d.at = bpf_ktime_get_ns();
	send_done(&d);
	return 0;
}

/* As many bios as the largest requests have. */
#define MAX_BIOS 1024

/* Other disks are given requests, each of one bio or of several that touch. */
SEC("tp_btf/block_rq_complete")
int rq_complete(__u64 *ctx)
{
	struct request *rq = (struct request *)ctx[0];
	struct bio *bio = rq->bio;
	__u32 left = (__u32)ctx[2]; /* bytes that have completed now */
	struct done d = { .kind = DONE };
	int i;

	if (!bio || !watched(bio))
		return 0;
	d.at = bpf_ktime_get_ns();
	for (i = 0; i < MAX_BIOS && bio; i++) {
		if (bio->bi_iter.bi_size > left)
			break;
		left -= bio->bi_iter.bi_size;
		d.bio = (__u64)bio;
		send_done(&d);
		bio = bio->bi_next;
	}
	return 0;
}

#define TCP_LISTEN 10
#define IPPROTO_TCP 6
#define AF_INET6 10

SEC("tp_btf/inet_sock_set_state")
int sock_set_state(__u64 *ctx)
{
	struct sock *sk = (struct sock *)ctx[0];
	struct task_struct *task;
	struct listen l = { .kind = LISTEN };

	if ((int)ctx[2] != TCP_LISTEN || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	task = bpf_get_current_task_btf();
	l.mnt_ns = task->nsproxy->mnt_ns->ns.inum;
	if (!counted(l.mnt_ns))
		return 0;

	l.at = bpf_ktime_get_ns();
	l.family = sk->__sk_common.skc_family;
	l.port = sk->__sk_common.skc_num;
	l.net_ns = sk->__sk_common.skc_net.net->ns.inum;
	if (l.family != AF_INET6)
		bpf_probe_read_kernel(l.addr, 4, &sk->__sk_common.skc_rcv_saddr);
	else if (field_exists(sk->__sk_common.skc_v6_rcv_saddr))
		bpf_probe_read_kernel(l.addr, 16, &sk->__sk_common.skc_v6_rcv_saddr);
	l.pid = task->tgid;
	bpf_probe_read_kernel(l.comm, sizeof(l.comm), task->group_leader->comm);
	send(&l, sizeof(l));
	return 0;
}
