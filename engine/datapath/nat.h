/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an engine does with one packet: find or make its flow in the bucket's shard, follow the
 * connection's state, rewrite addresses and ports. No I/O; the caller owns the bucket.
 *
 * Everything written lies in the first PS_UNDO_BYTES of the frame, so that one undo copy covers it.
 */
#ifndef PACKETSTACK_NAT_H
#define PACKETSTACK_NAT_H

#include <arpa/inet.h>

#include "packetstack/checksum.h"
#include "packetstack/hash.h"
#include "packetstack/parse.h"
#include "packetstack/shard.h"

#ifdef PS_INJECT
#include <stdlib.h>
#define PS_POISON "poison!!" /* the first 8 bytes of a UDP payload that no process survives */
#endif

enum ps_verdict { PS_DROP = 0, PS_TRANSMIT = 1, PS_PARK = 2, PS_CONSUMED = 3 };

#define PS_VERDICT(v) ((v)&15)
#define PS_SHIFT(v)   (((v) >> 4) * 4) /* how far the frame's start moved: VLAN tags are not sent on */

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };

struct ps_handler { /* one per core */
	struct ps_arena *arena;
	const struct ps_config *config;
	const struct ps_engine *engine;
	uint64_t *counters;  /* enum ps_counter */
	uint32_t now;	     /* ticks */
	uint32_t since;	     /* when `config` was taken, ticks */
	uint32_t half_limit; /* entries of a shard that half-open flows may hold */
	uint32_t turn[256];  /* round robin, per listener */
};

static inline uint8_t ps_refuse(struct ps_handler *h, enum ps_counter reason)
{
	h->counters[reason]++;
	return PS_DROP;
}

/* Half of a bucket's entries and half of its ports, whichever is less; at least one. */
static inline uint32_t ps_half_limit(const struct ps_arena *a, const struct ps_config *c)
{
	uint64_t ports = (uint64_t)ps_ports_per_bucket(a->buckets) * c->snats * (c->backends ? c->backends : 1) / 2;
	uint32_t entries = a->entries / 2;

	if (ports < 1)
		ports = 1;
	return ports < entries ? (uint32_t)ports : entries;
}

/* ---- opening a flow ------------------------------------------------------------------------------- */

static inline const struct ps_listener *ps_listener_find(const struct ps_config *c, const uint8_t *address,
							 uint16_t port, uint8_t protocol)
{
	uint8_t key[19];
	uint32_t low = 0, high = c->listeners;

	memcpy(key, address, 16);
	memcpy(key + 16, &port, 2);
	key[18] = protocol;
	while (low < high) {
		uint32_t middle = (low + high) / 2;
		int order = memcmp(key, &c->listener[middle], sizeof(key));

		if (!order)
			return &c->listener[middle];
		if (order < 0)
			high = middle;
		else
			low = middle + 1;
	}
	return NULL;
}

/* -> index into c->backend. The listener has at least one backend. */
static inline uint32_t ps_backend_choose(struct ps_handler *h, const struct ps_listener *l, const struct ps_key *k)
{
	const struct ps_config *c = h->config;
	uint64_t hash = k->hash * 0x9e3779b97f4a7c15ull;

	if (l->flags & PS_LISTENER_CLIENT_IP) {
		uint32_t none[4] = { 0 }, client[4];

		memcpy(client, k->source, 16);
		hash = ps_hash6(c->key0, c->key1, client, none, 0, 0, 0);
	} else if (l->balancing == PS_ROUND_ROBIN) {
		/* By weight: the Maglev table holds each backend as often as its weight asks. */
		uint32_t *turn = &h->turn[l - c->listener];

		hash = (uint64_t)(*turn)++ << 32;
		if (*turn >= l->lookup_size)
			*turn = 0;
	} else if (l->balancing == PS_LEAST_FLOWS) {
		uint32_t best = l->first_backend;
		uint64_t best_load = UINT64_MAX;
		uint32_t start = (uint32_t)(hash >> 40) % l->backends;

		for (uint32_t i = 0; i < l->backends; i++) {
			uint32_t at = l->first_backend + (start + i) % l->backends;
			int32_t live = __atomic_load_n(&h->arena->backend[c->backend[at].id].live, __ATOMIC_RELAXED);
			uint64_t load = ((uint64_t)(live > 0 ? live : 0) << 16) / c->backend[at].weight;

			if (load < best_load) {
				best_load = load;
				best = at;
			}
		}
		return best;
	}
	return l->first_backend + c->lookup[l->lookup + (uint32_t)(hash >> 32) % l->lookup_size];
}

static inline bool ps_is_v6(const uint8_t *address)
{
	static const uint8_t mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

	return memcmp(address, mapped, 12) != 0;
}

/* Makes the flow of an opener: backend, SNAT address and port. NULL with the reason counted. */
static inline struct ps_flow *ps_flow_open(struct ps_handler *h, struct ps_shard *s, uint32_t bucket,
					   const struct ps_key *k)
{
	const struct ps_config *c = h->config;
	const struct ps_listener *l = ps_listener_find(c, k->destination, k->dport, k->udp ? 17 : 6);
	struct ps_flow value = { .hash = k->hash, .client_port = k->sport, .vip_port = k->dport };
	uint16_t family = ps_is_v6(k->destination) ? 6 : 4;
	uint32_t backend, recycled = 0;
	struct ps_flow *room;

	if (!l) {
		h->counters[PS_C_DROP_NO_LISTENER]++;
		return NULL;
	}
	if (!l->backends) {
		h->counters[PS_C_DROP_NO_BACKEND]++;
		return NULL;
	}
	room = ps_flow_room(h->arena, s, h->half_limit, &recycled);
	h->counters[PS_C_FLOWS_RECYCLED] += recycled;
	h->counters[PS_C_FLOWS_ENDED] += recycled;
	if (!room) {
		h->counters[PS_C_DROP_SHARD_FULL]++;
		return NULL;
	}
	memcpy(value.client, k->source, 16);
	value.vip = l->vip;
	value.flags = (k->udp ? PS_FLOW_UDP : 0) | (family == 6 ? PS_FLOW_V6 : 0);
	value.state = k->udp ? PS_FLOW_UNANSWERED : PS_FLOW_SYN;

	backend = ps_backend_choose(h, l, k);
	for (uint32_t try = 0; try < l->backends && try < 8 && !value.snat_port; try++) {
		const struct ps_config_backend *b = &c->backend[backend];

		/* Other SNAT addresses first, then other backends (never with affinity). */
		for (uint32_t i = 0; i < c->snats && !value.snat_port; i++) {
			const struct ps_config_snat *n = &c->snat[((k->hash >> 8) + i) % c->snats];

			if (n->family != family)
				continue;
			value.snat_port = ps_port_find(h->arena, s, bucket, n->id, b->address, b->port, k->udp);
			value.snat = n->id;
		}
		memcpy(value.backend, b->address, 16);
		value.backend_port = b->port;
		value.backend_id = b->id;
		if (l->flags & PS_LISTENER_CLIENT_IP)
			break;
		if (++backend == l->first_backend + l->backends)
			backend = l->first_backend;
	}
	if (!value.snat_port) {
		h->counters[PS_C_DROP_NO_PORT]++;
		return NULL;
	}
	ps_flow_insert(h->arena, s, room, &value, c->timeout, h->now);
	h->counters[PS_C_FLOWS_CREATED]++;
	return room;
}

static inline bool ps_backend_serves(const struct ps_config *c, const struct ps_flow *f, const struct ps_key *k)
{
	const struct ps_listener *l = ps_listener_find(c, k->destination, k->dport, k->udp ? 17 : 6);

	for (uint32_t i = 0; l && i < l->backends; i++) {
		const struct ps_config_backend *b = &c->backend[l->first_backend + i];

		if (b->port == f->backend_port && !memcmp(b->address, f->backend, 16))
			return true;
	}
	return false;
}

/*
 * A UDP flow has no end that anybody would wait for: it leaves a backend that gets no new flows, with its next
 * packet, if there is another. Looked at once a flow and configuration: not when it was seen since.
 */
static inline bool ps_flow_leaves(const struct ps_handler *h, const struct ps_flow *f, const struct ps_key *k)
{
	const struct ps_listener *l;

	if (!k->udp || (int32_t)(f->last_seen - h->since) > 0)
		return false;
	l = ps_listener_find(h->config, k->destination, k->dport, 17);
	return l && l->backends && !ps_backend_serves(h->config, f, k);
}

/* ---- connection state ------------------------------------------------------------------------------ */

static inline void ps_track(struct ps_handler *h, struct ps_shard *s, struct ps_flow *f, uint8_t tcp, bool reply)
{
	uint8_t state = f->state;

	if (f->last_seen != h->now)
		f->last_seen = h->now;
	if (f->flags & PS_FLOW_UDP) {
		if (reply && state == PS_FLOW_UNANSWERED)
			ps_flow_set_state(h->arena, s, f, PS_FLOW_ASSURED, h->config->timeout, h->now);
		return;
	}
	if (state == PS_FLOW_ESTABLISHED && !(tcp & (TCP_FIN | TCP_RST)))
		return;
	if (tcp & TCP_RST) {
		state = PS_FLOW_CLOSED;
	} else {
		if (tcp & TCP_FIN)
			f->flags |= reply ? PS_FLOW_FIN_BACKEND : PS_FLOW_FIN_CLIENT;
		if ((f->flags & (PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND)) ==
		    (PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND))
			state = PS_FLOW_CLOSED;
		else if (f->flags & (PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND))
			state = PS_FLOW_CLOSING;
		else if (state == PS_FLOW_SYN && reply && (tcp & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK))
			state = PS_FLOW_SYN_ACK;
		else if (state == PS_FLOW_SYN_ACK && !reply && (tcp & (TCP_SYN | TCP_ACK)) == TCP_ACK)
			state = PS_FLOW_ESTABLISHED;
		else if (state == PS_FLOW_CLOSED && (tcp & (TCP_SYN | TCP_ACK)) == TCP_ACK)
			state = PS_FLOW_ESTABLISHED; /* the reset was not believed by its receiver */
	}
	ps_flow_set_state(h->arena, s, f, state, h->config->timeout, h->now);
}

/* ---- rewriting ------------------------------------------------------------------------------------- */

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
	uint32_t mtu = h->config->mtu, end = (tcp[12] >> 4) * 4u, at = 20;
	uint32_t most = mtu - (family == 4 ? 40 : 60);

	if (!mtu || end > length)
		return 0;
	while (at + 1 < end && tcp[at]) {
		if (tcp[at] == 1) {
			at++;
			continue;
		}
		if (tcp[at + 1] < 2 || at + tcp[at + 1] > end)
			break;
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
		at += tcp[at + 1];
	}
	return 0;
}

static inline uint8_t ps_rewrite(struct ps_handler *h, const struct ps_flow *f, uint8_t *frame,
				 const struct ps_packet *p, bool reply)
{
	const struct ps_arena *a = h->arena;
	const uint8_t *source = reply ? ps_address(a, f->vip) : ps_address(a, f->snat);
	const uint8_t *destination = reply ? f->client : f->backend;
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
			/* Two clients behind one SNAT address must not share an id: all fragments get the same change. */
			uint16_t id, mix = (uint16_t)(f->hash ^ f->hash >> 16);

			memcpy(&id, ip + 4, 2);
			id ^= reply ? 0 : mix;
			header += ps_replace(ip + 4, &id, 2);
		}
		ps_checksum_apply(ip + 10, header);
	} else {
		ip[7]--;
	}
	if (p->kind != PS_PKT_FRAGMENT) {
		uint16_t ports[2] = { reply ? f->vip_port : f->snat_port, reply ? f->client_port : f->backend_port };

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
static inline uint8_t ps_translate_icmp(struct ps_handler *h, const struct ps_flow *f, uint8_t *frame,
					const struct ps_packet *p, bool reply)
{
	const uint8_t *vip = ps_address(h->arena, f->vip), *snat = ps_address(h->arena, f->snat);
	uint8_t *ip = frame + p->l3, *icmp = frame + p->l4, *inner = frame + p->inner_l3, *l4 = frame + p->inner_l4;
	uint32_t check = p->protocol == 6 ? 16 : 6;
	uint16_t ports[2];
	uint64_t outer, addresses, inside, changed;

	outer = ps_set_addresses(ip, p->family, reply ? vip : snat, reply ? f->client : f->backend);
	addresses = reply ? ps_set_addresses(inner, p->family, f->client, vip)
			  : ps_set_addresses(inner, p->family, f->backend, snat);
	changed = addresses;
	if (p->family == 4)
		changed += ps_checksum_apply(inner + 10, addresses);
	ports[0] = reply ? f->client_port : f->backend_port;
	ports[1] = reply ? f->vip_port : f->snat_port;
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

/* Answers a TCP segment that has no flow by a reset (RFC 9293, 3.10.7.1), in place. unknownFlow: Reset. */
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

/* ---- one packet ------------------------------------------------------------------------------------ */

/*
 * frame: `length` bytes, writable; at least PS_UNDO_BYTES may be touched behind it if it is shorter.
 * -> verdict | shift/4 << 4. The caller owns stamp->bucket. Every drop is counted with its reason.
 */
static inline uint8_t ps_handle(struct ps_handler *h, uint8_t *frame, uint32_t length, const struct ps_stamp *stamp)
{
	struct ps_shard *s = ps_shard_at(h->arena, stamp->bucket);
	bool reply = stamp->flags & PS_STAMP_REPLY;
	struct ps_flow *f;
	struct ps_packet p = { 0 };
	struct ps_key k;
	uint32_t touched;

	if (ps_parse(frame, frame + length, &p) == PS_PKT_MALFORMED)
		return ps_refuse(h, PS_C_DROP_MALFORMED);
	if (p.kind != PS_PKT_FLOW && p.kind != PS_PKT_FRAGMENT && p.kind != PS_PKT_ICMP_ERROR)
		return ps_refuse(h, PS_C_DROP_UNSUPPORTED);
	if (frame[p.l3 + (p.family == 4 ? 8 : 7)] <= 1)
		return ps_refuse(h, PS_C_DROP_TTL);
	touched = p.kind == PS_PKT_ICMP_ERROR ? p.inner_l4 + 8u
		  : p.kind == PS_PKT_FRAGMENT ? p.l3 + 40u
		  : p.protocol == 17	      ? p.l4 + 8u
					      : p.l4 + (p.tcp_flags & TCP_SYN ? (frame[p.l4 + 12] >> 4) * 4u : 20u);
	if (touched > PS_UNDO_BYTES)
		return ps_refuse(h, PS_C_DROP_UNSUPPORTED);

	s->packets++;
	k.udp = p.protocol == 17 || stamp->flags & PS_STAMP_UDP;
	k.hash = stamp->hash;
	if (p.kind == PS_PKT_ICMP_ERROR) {
		/* Embedded is what we sent, so its destination is the peer of the flow on that side. */
		memcpy(k.source, p.dst, 16);
		memcpy(k.destination, p.src, 16);
		k.sport = p.dport;
		k.dport = p.sport;
	} else {
		memcpy(k.source, p.src, 16);
		memcpy(k.destination, p.dst, 16);
		k.sport = p.sport;
		k.dport = p.dport;
	}
	if (p.kind == PS_PKT_FRAGMENT) {
		k.sport = htons((uint16_t)(stamp->hash >> 16));
		k.dport = htons((uint16_t)stamp->hash);
	}
	if (p.kind == PS_PKT_FRAGMENT || (!k.hash && !reply)) {
		const struct ps_config *c = h->config;
		uint64_t hash =
			p.family == 4 ? ps_hash4(c->key0, c->key1, p.src[3], p.dst[3], k.sport, k.dport, k.udp ? 17 : 6)
				      : ps_hash6(c->key0, c->key1, p.src, p.dst, k.sport, k.dport, k.udp ? 17 : 6);
		k.hash = (uint32_t)(hash >> 32);
	}

	f = reply ? ps_find_reply(h->arena, s, &k) : ps_find_forward(h->arena, s, &k);
	if (p.kind == PS_PKT_ICMP_ERROR)
		return f ? ps_translate_icmp(h, f, frame, &p, reply) : ps_refuse(h, PS_C_DROP_NO_FLOW);
	if (f && !reply && ps_flow_leaves(h, f, &k)) {
		ps_flow_remove(h->arena, s, f);
		h->counters[PS_C_FLOWS_ENDED]++;
		f = NULL;
	}
	if (f && !reply && f->state == PS_FLOW_CLOSED && (p.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN &&
	    !k.udp) {
		/* The client's port is used again. Same backend and SNAT port if that backend still serves. */
		if (ps_backend_serves(h->config, f, &k)) {
			f->flags &= (uint8_t) ~(PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND);
			ps_flow_set_state(h->arena, s, f, PS_FLOW_SYN, h->config->timeout, h->now);
		} else {
			ps_flow_remove(h->arena, s, f);
			h->counters[PS_C_FLOWS_ENDED]++;
			f = NULL;
		}
	}
	if (!f) {
		if (reply || p.kind == PS_PKT_FRAGMENT ||
		    (!k.udp && (p.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) != TCP_SYN)) {
			if (h->config->unknown_flow_reset && !reply && p.kind == PS_PKT_FLOW && !k.udp &&
			    ps_reset(h, frame, &p) & PS_TRANSMIT)
				return (uint8_t)(PS_TRANSMIT | (p.l3 - 14) / 4 << 4);
			return ps_refuse(h, PS_C_DROP_NO_FLOW);
		}
		f = ps_flow_open(h, s, stamp->bucket, &k);
		if (!f)
			return PS_DROP;
	}
	ps_track(h, s, f, p.kind == PS_PKT_FLOW && !k.udp ? p.tcp_flags : 0, reply);
	return ps_rewrite(h, f, frame, &p, reply);
}

#endif
