/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rewrites a packet for its way on: addresses, ports, checksums, MSS; the packet in an ICMP error; resets.
 *
 * Everything written lies in the first PS_UNDO_BYTES of the frame, so that one undo copy covers it.
 */
#ifndef PACKETSTACK_REWRITE_H
#define PACKETSTACK_REWRITE_H

#include <arpa/inet.h>

#include "packetstack/checksum.h"
#include "packetstack/parse.h"
#include "handler.h"

#ifdef PS_INJECT
#include <stdlib.h>
#define PS_POISON "poison!!" /* the first 8 bytes of a UDP payload that no process survives */
#endif

static inline void ps_ethernet(const struct ps_engine *e, uint8_t *frame, uint32_t l3, uint8_t family)
{
	uint8_t *at = frame + l3 - 14;

	memcpy(at, e->gateway_mac, 6);
	memcpy(at + 6, e->mac, 6);
	at[12] = family == 4 ? 0x08 : 0x86;
	at[13] = family == 4 ? 0x00 : 0xdd;
}

/* Sets addresses of the IP header at `ip`; -> difference for checksums over the pseudo header. */
static inline uint64_t ps_set_addresses(uint8_t *ip, uint8_t family, const uint8_t *source, const uint8_t *destination)
{
	uint64_t d;

	if (family == 4) {
		uint32_t was[2], is[2];

		memcpy(was, ip + 12, 8);
		memcpy(&is[0], source + 12, 4);
		memcpy(&is[1], destination + 12, 4);
		memcpy(ip + 12, is, 8);
		return (uint64_t)(uint32_t)~was[0] + (uint32_t)~was[1] + is[0] + is[1];
	}
	d = ps_replace(ip + 8, source, 16);
	return d + ps_replace(ip + 24, destination, 16);
}

/* MSS option of a SYN down to what fits into `mtu`. -> difference for the TCP checksum. */
static inline uint64_t ps_clamp_mss(struct ps_handler *h, uint8_t *tcp, uint32_t length, uint8_t family)
{
	uint32_t mtu = h->config->mtu, end = (tcp[12] >> 4) * 4u;
	uint32_t most = mtu - (family == 4 ? 40 : 60);

	if (!mtu || end > length)
		return 0;
	for (uint32_t at = ps_option(tcp, end, 20); at; at = ps_option(tcp, end, at + tcp[at + 1])) {
		if (tcp[at] == 2 && tcp[at + 1] == 4) {
			uint32_t mss = (uint32_t)tcp[at + 2] << 8 | tcp[at + 3];
			uint8_t word[2] = { (uint8_t)(most >> 8), (uint8_t)most };

			if (mss <= most)
				return 0;
			h->counters[PS_C_MSS_CLAMPED]++;
			if (!(at & 1))
				return ps_replace(tcp + at + 2, word, 2);
			/* At an odd offset each byte counts in the other half of its 16-bit word. */
			{
				uint8_t four[4];

				memcpy(four, tcp + at + 1, 4);
				four[1] = word[0];
				four[2] = word[1];
				return ps_replace(tcp + at + 1, four, 4);
			}
		}
	}
	return 0;
}

static inline uint8_t ps_rewrite(struct ps_handler *h, const struct ps_entry *f, uint8_t *frame,
				 const struct ps_packet *p, bool reply)
{
	const struct ps_arena *a = h->arena;
	const struct ps_listener_name *listener = ps_listener_of(a, f);
	const struct ps_backend *backend = ps_backend_of(a, f);
	const uint8_t *source = reply ? listener->address : ps_address(a, f->snat);
	const uint8_t *destination = reply ? f->client : backend->address;
	uint8_t *ip = frame + p->l3, *l4 = frame + p->l4;
	uint64_t d;

	d = ps_set_addresses(ip, p->family, source, destination);
	PS_POINT(REWRITE_ADDRESSES);
#ifdef PS_INJECT
	if (p->kind != PS_PKT_FRAGMENT && p->l4 + 28u <= p->end && !memcmp(frame + p->l4 + 8, PS_POISON, 8))
		abort();
#endif
	if (p->family == 4) {
		uint64_t header = d;
		uint8_t word[2] = { (uint8_t)(ip[8] - 1), ip[9] };

		header += ps_replace(ip + 8, word, 2);
		if ((ip[6] & 0x3f) | ip[7]) {
			/* Two clients behind one SNAT address, or two backends behind one virtual address, must not
			 * share an id: all fragments of a flow get the same change. */
			uint16_t id, mix = (uint16_t)(f->hash ^ f->hash >> 16);

			memcpy(&id, ip + 4, 2);
			id ^= mix;
			header += ps_replace(ip + 4, &id, 2);
		}
		ps_checksum_apply(ip + 10, header);
	} else {
		ip[7]--;
	}
	if (p->kind != PS_PKT_FRAGMENT) {
		uint16_t ports[2] = { reply ? listener->port : f->snat_port, reply ? f->client_port : backend->port };

		d += ps_replace(l4, ports, 4);
		PS_POINT(REWRITE_PORTS);
		if (p->protocol == 6) {
			if (p->tcp_flags & TCP_SYN)
				d += ps_clamp_mss(h, l4, p->end - p->l4, p->family);
			ps_checksum_apply(l4 + 16, d);
		} else {
			ps_checksum_apply_udp(l4 + 6, d);
		}
	}
	PS_POINT(REWRITE_CHECKSUMS);
	ps_ethernet(h->engine, frame, p->l3, p->family);
	h->counters[PS_C_FORWARDED]++;
	h->counters[PS_C_FORWARDED_BYTES] += p->end - p->l3 + 14u;
	return (uint8_t)(PS_TRANSMIT | (p->l3 - 14) / 4 << 4);
}

/*
 * An ICMP error about one of our flows. Towards the backend when its embedded packet is what we sent
 * to the client, towards the client when it is what we sent to the backend. The embedded header is
 * translated to what its sender knows.
 */
static PS_RARE uint8_t ps_translate_icmp(struct ps_handler *h, const struct ps_entry *f, uint8_t *frame,
					 const struct ps_packet *p, bool reply)
{
	const struct ps_listener_name *listener = ps_listener_of(h->arena, f);
	const struct ps_backend *backend = ps_backend_of(h->arena, f);
	const uint8_t *vip = listener->address, *snat = ps_address(h->arena, f->snat);
	uint8_t *ip = frame + p->l3, *icmp = frame + p->l4, *inner = frame + p->inner_l3, *l4 = frame + p->inner_l4;
	uint32_t check = p->protocol == 6 ? 16 : 6;
	uint16_t ports[2];
	uint64_t outer, addresses, inside, changed;

	outer = ps_set_addresses(ip, p->family, reply ? vip : snat, reply ? f->client : backend->address);
	addresses = reply ? ps_set_addresses(inner, p->family, f->client, vip)
			  : ps_set_addresses(inner, p->family, backend->address, snat);
	changed = addresses;
	if (p->family == 4)
		changed += ps_checksum_apply(inner + 10, addresses);
	ports[0] = reply ? f->client_port : backend->port;
	ports[1] = reply ? listener->port : f->snat_port;
	inside = ps_replace(l4, ports, 4);
	changed += inside;
	if (p->inner_l4 + check + 2u <= p->end && p->inner_l4 + check + 2u <= PS_UNDO_BYTES)
		changed += p->protocol == 6 ? ps_checksum_apply(l4 + check, addresses + inside)
					    : ps_checksum_apply_udp(l4 + check, addresses + inside);
	if (p->family == 4) {
		uint8_t word[2] = { (uint8_t)(ip[8] - 1), ip[9] };

		ps_checksum_apply(ip + 10, outer + ps_replace(ip + 8, word, 2));
		ps_checksum_apply(icmp + 2, changed);
	} else {
		ip[7]--;
		ps_checksum_apply(icmp + 2, changed + outer);
	}
	ps_ethernet(h->engine, frame, p->l3, p->family);
	h->counters[PS_C_ICMP_TRANSLATED]++;
	h->counters[PS_C_FORWARDED]++;
	h->counters[PS_C_FORWARDED_BYTES] += p->end - p->l3 + 14u;
	return (uint8_t)(PS_TRANSMIT | (p->l3 - 14) / 4 << 4);
}

/* Answers a TCP segment by a reset (RFC 9293, 3.10.7.1), in place. -> verdict */
static inline uint8_t ps_reset(struct ps_handler *h, uint8_t *frame, const struct ps_packet *p)
{
	uint8_t *ip = frame + p->l3, *tcp = frame + p->l4;
	uint32_t header = p->l4 - p->l3, sequence, acknowledged, payload = p->end - p->l4 - (tcp[12] >> 4) * 4u;
	uint16_t ports[2], zero = 0, length, check;
	uint64_t sum;

	if (p->tcp_flags & TCP_RST || (p->family == 6 && header != 40) || p->l4 + 20u > PS_UNDO_BYTES)
		return PS_DROP;
	memcpy(ports, tcp, 4);
	memcpy(&sequence, tcp + 4, 4);
	memcpy(&acknowledged, tcp + 8, 4);
	sequence = htonl(ntohl(sequence) + payload + !!(p->tcp_flags & TCP_SYN) + !!(p->tcp_flags & TCP_FIN));
	memset(tcp, 0, 20);
	memcpy(tcp, &ports[1], 2);
	memcpy(tcp + 2, &ports[0], 2);
	if (p->tcp_flags & TCP_ACK)
		memcpy(tcp + 4, &acknowledged, 4);
	else
		memcpy(tcp + 8, &sequence, 4);
	tcp[12] = 5 << 4;
	tcp[13] = p->tcp_flags & TCP_ACK ? TCP_RST : TCP_RST | TCP_ACK;
	ps_set_addresses(ip, p->family, (const uint8_t *)p->dst, (const uint8_t *)p->src);
	sum = ps_sum(tcp, 20, (uint64_t)htons(20) + htons(6));
	if (p->family == 4) {
		length = htons((uint16_t)(header + 20));
		memcpy(ip + 2, &length, 2);
		memset(ip + 4, 0, 4);
		ip[8] = 64;
		memcpy(ip + 10, &zero, 2);
		check = (uint16_t)~ps_fold(ps_sum(ip, header, 0));
		memcpy(ip + 10, &check, 2);
		sum = ps_sum(ip + 12, 8, sum);
	} else {
		length = htons(20);
		memcpy(ip + 4, &length, 2);
		ip[7] = 64;
		sum = ps_sum(ip + 8, 32, sum);
	}
	check = (uint16_t)~ps_fold(sum);
	memcpy(tcp + 16, &check, 2);
	ps_ethernet(h->engine, frame, p->l3, p->family);
	h->counters[PS_C_RESETS_SENT]++;
	h->counters[PS_C_FORWARDED]++;
	h->counters[PS_C_FORWARDED_BYTES] += header + 20u + 14u;
	return (uint8_t)(PS_TRANSMIT | (p->l3 - 14) / 4 << 4);
}

/* A packet without a flow that begins none, or may begin none: answered if the resource says so, or dropped. */
static PS_RARE uint8_t ps_turn_away(struct ps_handler *h, uint8_t *frame, const struct ps_packet *p, bool answer,
				    enum ps_counter reason)
{
	if (answer && p->kind == PS_PKT_FLOW && p->protocol == 6) {
		uint8_t verdict = ps_reset(h, frame, p);

		if (PS_VERDICT(verdict) == PS_TRANSMIT)
			return verdict;
	}
	return ps_refuse(h, reason);
}

#endif
