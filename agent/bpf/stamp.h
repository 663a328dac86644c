/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Where the director writes the stamp (struct ps_stamp): the XDP metadata directly before the frame. */
#ifndef PACKETSTACK_STAMP_H
#define PACKETSTACK_STAMP_H

/* Stamps the frame for the owner that the bucket's word names. -> 0: the driver leaves no room for it */
PS_INLINE int stamp_frame(struct xdp_md *ctx, uint64_t word, uint32_t bucket, uint32_t hash, uint32_t flags)
{
	/* adjust_meta is relative, and a frame may come with metadata: make it 16 bytes exactly. */
	long have = (long)ctx->data - (long)ctx->data_meta;
	struct ps_stamp *stamp;

	if (have != sizeof(*stamp) && bpf_xdp_adjust_meta(ctx, (int)have - (int)sizeof(*stamp)))
		return 0;
	stamp = (void *)(long)ctx->data_meta;
	if ((void *)(stamp + 1) > (void *)(long)ctx->data)
		return 0;
	stamp->magic = PS_STAMP_MAGIC;
	stamp->flags = (uint16_t)(flags | ps_word_slot(word) << PS_STAMP_SLOT |
				  (ps_word_prev_slot(word) ? PS_STAMP_MIRROR : 0));
	stamp->epoch = ps_word_epoch(word);
	stamp->bucket = bucket;
	stamp->queue = ps_word_queue(word);
	stamp->prev_queue = ps_word_prev_queue(word);
	stamp->hash = hash;
	return 1;
}

#endif
