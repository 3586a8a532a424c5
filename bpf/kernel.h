/* SPDX-License-Identifier: GPL-2.0 OR MIT */

/*
 * What probe.bpf.c uses of the kernel, and no more: types with the members that
 * are read, helpers, attributes of sections. Members are found by name when the
 * program is loaded (CO-RE), so neither their order nor what lies between them
 * matters here.
 */
#ifndef REPRISE_KERNEL_H
#define REPRISE_KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef _Bool bool;

#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))

/* Members of maps, in the notation that loaders read. */
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name

/* True if the member is there in the running kernel. */
#define field_exists(field) __builtin_preserve_field_info(field, 2)

/* include/uapi/linux/bpf.h */

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum { BPF_RB_NO_WAKEUP = 1 };

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static long (*bpf_probe_read_kernel)(void *dst, __u32 size, const void *unsafe) = (void *)113;
static long (*bpf_ringbuf_output)(void *ring, void *data, __u64 size, __u64 flags) = (void *)130;
static struct task_struct *(*bpf_get_current_task_btf)(void) = (void *)158;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* The block layer. */

struct block_device {
	__u32 bd_dev; /* major << 20 | minor */
	struct gendisk *bd_disk;
};

struct gendisk {
	struct block_device *part0; /* the whole disk */
};

struct bvec_iter {
	__u64 bi_sector; /* 512 bytes each */
	__u32 bi_size;	 /* bytes */
};

struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev; /* since Linux 5.12 */
	__u32 bi_opf;
	struct bvec_iter bi_iter;
};

struct request {
	struct bio *bio;
};

/* Processes. */

struct ns_common {
	__u32 inum;
};

struct mnt_namespace {
	struct ns_common ns;
};

struct nsproxy {
	struct mnt_namespace *mnt_ns;
};

struct task_struct {
	__u32 flags;
	int tgid;
	struct task_struct *group_leader;
	struct nsproxy *nsproxy;
	char comm[16];
};

/* Sockets. */

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	union {
		__u8 u6_addr8[16];
	} in6_u;
};

struct sock_common {
	__u32 skc_rcv_saddr; /* network byte order */
	__u16 skc_num;	     /* host byte order */
	__u16 skc_family;
	possible_net_t skc_net;
	struct in6_addr skc_v6_rcv_saddr;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
};

#pragma clang attribute pop

#endif
