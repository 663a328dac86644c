"""How things look on a terminal."""

import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from packetstack_cli.checks import Check
from packetstack_cli.simulate import Tick
from packetstack_cli.simulate_sizes import SizeTick
from packetstack_core.values import quantity
from packetstack_core.verbs import Json
from packetstack_core.wording import counted

HOTTEST = 8
"""Queues that `top` lists by themselves."""
# Output that goes into a file or a pipe is never cut.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def data(value: Any, form: str) -> str:
    """A value as JSON or YAML."""
    if form == "json":
        return json.dumps(value, indent=2)
    return yaml.safe_dump(value, sort_keys=False).rstrip()


def _number(value: float | None, form: str = ",") -> str:
    """ "-" for a number that only an agent knows, when none was asked."""
    return "-" if value is None else format(value, form)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.isupper() and column in {
            "BUCKETS",
            "FLOWS",
            "PACKETS/S",
            "BUSY",
            "PARKED",
            "TOTAL",
            "DROPS",
            "DEPTH",
            "KEPT",
            "CONNECTIONS",
            "MIRRORED",
        }
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    return table


def stacks(items: Sequence[Json]) -> Table:
    """One line a stack."""
    table = _table("NAME", "READY", "DRAINING", "FLOWS", "BACKENDS", "ADDRESSES")
    for item in items:
        status = item["status"]
        there = str(len(status["backends"]))
        if all(b["healthy"] is not None for b in status["backends"]):
            there = f"{sum(b['healthy'] for b in status['backends'])}/{there}"
        addresses = ", ".join(dict.fromkeys(li["address"] for li in item["spec"]["listeners"]))
        table.add_row(
            item["metadata"]["name"],
            f"{status['readyReplicas']}/{item['spec']['replicas']}",
            str(status["drainingReplicas"]),
            f"{status['flows']:,}",
            there,
            addresses,
        )
    return table


def engines(item: Json) -> Table:
    """One line an engine."""
    table = _table("ENGINE", "STATE", "BUCKETS", "FLOWS", "PACKETS/S", "BUSY", "PID")
    for engine in item["status"]["engines"]:
        table.add_row(
            str(engine["slot"]),
            engine["state"] if engine["ready"] else f"{engine['state']} (not ready)",
            f"{engine['buckets']:,}",
            f"{engine['flows']:,}",
            _number(engine["packetsPerSecond"], ",.0f"),
            _number(engine["busy"], ".0%"),
            str(engine["pid"] or "-"),
        )
    return table


def top(items: Sequence[Json]) -> Group:
    """Engines, cores and queues, live."""
    parts: list[RenderableType] = []
    for item in items:
        status = item["status"]
        rate = sum(e["packetsPerSecond"] or 0.0 for e in status["engines"])
        head = f"{item['metadata']['name']}  {status['readyReplicas']}/{item['spec']['replicas']} engines  "
        parts.append(Text(f"{head}{status['flows']:,} flows  {rate:,.0f} packets/s", style="bold"))
        parts += [engines(item), *_while_there_are_two(item)]
        table = _table("ENGINE", "CORE", "CPU", "BUSY", "QUEUE", "PACKETS/S", "PARKED")
        for engine in status["engines"]:
            for core in engine["cores"]:
                for i, queue in enumerate(core["queues"] or [None]):
                    first = i == 0
                    table.add_row(
                        str(engine["slot"]) if first else "",
                        str(core["core"]) if first else "",
                        str(core["cpu"]) if first else "",
                        f"{core['busy']:.0%}" if first else "",
                        str(queue["queue"]) if queue else "-",
                        f"{queue['packetsPerSecond']:,.0f}" if queue else "",
                        str(queue["parked"]) if queue else "",
                    )
        parts += [Text(), table, Text(), *_hot_queues(status["engines"]), *_rebalance(status["rebalance"], 5)]
    return Group(*parts)


def transitions(items: Sequence[Json]) -> Group:
    """Stacks that have two sets of engines, and how far each is; a line for those that have not."""
    parts: list[RenderableType] = []
    for item in items:
        parts.append(Text(f"Stack {item['metadata']['name']}", style="bold"))
        parts += transition(item) if two_sets(item) else [Text("  no transition: there is one set of engines")]
        parts.append(Text())
    return Group(*parts[:-1])


def two_sets(item: Json) -> bool:
    """Whether the stack is between two sets of engines."""
    return len(item["status"].get("sets") or ()) > 1


def _while_there_are_two(item: Json) -> list[RenderableType]:
    return [Text(), *transition(item)] if two_sets(item) else []


def transition(item: Json) -> list[RenderableType]:
    """Both sets, what is left of the older one, and when it ends."""
    sets = item["status"]["sets"]
    table = _table("SET", "STATE", "SINCE", "READY", "BUCKETS", "KEPT", "CONNECTIONS", "MIRRORED", "REJECTED")
    for s in sets:
        rejected = ", ".join(f"{reason} {n:,}" for reason, n in (s.get("rejected") or {}).items() if n)
        table.add_row(
            str(s["id"]),
            s["state"],
            time.strftime("%H:%M:%S", time.localtime(_seconds(s["since"]))),
            f"{s['ready']}/{s['engines']}",
            f"{s['buckets']:,}",
            f"{s['keptBuckets']:,}",
            _number(s.get("connections")),
            _number(s.get("mirrored")),
            rejected or "-",
        )
    return [table, *(Text(f"  {word:9}{text}") for word, text in _how_far(sets))]


def _how_far(sets: Sequence[Json]) -> list[tuple[str, str]]:
    """What a transition waits for."""
    by_state = {s["state"]: s for s in sets}
    current, old = by_state["Current"], by_state.get("Draining")
    if old is None:
        second = by_state["Activating"]
        ready = f"{second['ready']} of {counted(second['engines'], 'engine')} ready"
        return [("waits", f"for set {second['id']}: {ready}; set {current['id']} serves")]
    all_buckets = current["buckets"] + old["buckets"]
    lines = [("buckets", f"{current['buckets']:,} of {all_buckets:,} switched; {old['keptBuckets']:,} kept by both")]
    if old.get("connections") is None:
        return lines
    left = counted(old["connections"], "connection")
    if old.get("silentSince"):
        left += f"; the one that has been silent for longest: {_duration(time.time() - _seconds(old['silentSince']))}"
    lines.append(("left", left))
    if old.get("endsInSeconds") is not None:
        lines.append(("ends", f"in {_duration(old['endsInSeconds'])}, at the pace of the last minute"))
    else:
        lines.append(("ends", "not within sight: no connection has ended in the last minute"))
    return lines


def _seconds(rfc3339: str) -> float:
    return datetime.fromisoformat(rfc3339).timestamp()


def _duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _hot_queues(engines: Sequence[Json]) -> list[RenderableType]:
    """Those that take most of a core, the hottest first."""
    found = [(e["slot"], c["core"], q) for e in engines for c in e["cores"] for q in c["queues"] if q["busy"] > 0]
    found.sort(key=lambda x: (-x[2]["busy"], -x[2]["packetsPerSecond"], x[0]))
    table = _table("HOT QUEUE", "ENGINE", "CORE", "BUSY", "PACKETS/S", "DEPTH")
    for slot, core, queue in found[:HOTTEST]:
        rate = f"{queue['packetsPerSecond']:,.0f}"
        table.add_row(str(queue["queue"]), str(slot), str(core), f"{queue['busy']:.0%}", rate, f"{queue['depth']:,}")
    return [table, Text()] if found else []


def _rebalance(status: Json, most: int) -> list[RenderableType]:
    """Moves, newest first, and what no move helps."""
    parts: list[RenderableType] = []
    for e in status["elephants"]:
        takes = f" of engine {e['engine']} takes {e['load']:.0%} of a core" if e["load"] is not None else ""
        parts.append(Text(f"elephant: bucket {e['bucket']}{takes}; no move of buckets helps it", style="yellow"))
    table = _table("MOVED", "WHAT", "WHY")
    for m in reversed(status["lastMoves"][-most:]):
        table.add_row(time.strftime("%H:%M:%S", time.localtime(m["time"])), m["what"], m["why"])
    return [*parts, table, Text()] if table.row_count else parts


def describe(item: Json, happened: Sequence[Json]) -> Group:
    """Everything about a stack."""
    status, spec = item["status"], item["spec"]
    capacity = status["capacity"]
    parts: list[RenderableType] = [
        Text(f"Stack {item['metadata']['name']}", style="bold"),
        Text(
            f"  engines    {status['readyReplicas']} ready of {spec['replicas']} wanted, {status['drainingReplicas']} draining"
        ),
        Text(f"  flows      {status['flows']:,} live"),
        Text(
            f"  capacity   {min(capacity['flows'], capacity['maxFlows']):,} flows "
            f"({capacity['pairs']} pairs of SNAT address and backend allow {capacity['flows']:,}; maxFlows {capacity['maxFlows']:,})"
        ),
    ]
    for left in status.get("leaving") or ():
        flows = counted(left["flows"], "flow")
        parts.append(Text(f"  leaving    SNAT address {left['address']}: {flows} of before; no new one gets it"))
    rebalance = status["rebalance"]
    uneven = f", busiest core {rebalance['maxOverMean']:.2f} times the mean" if rebalance["maxOverMean"] else ""
    numbers = ((rebalance["bucketsMoved"], "buckets"), (rebalance["queuesMoved"], "queues"))
    moved = " and ".join(f"{n:,} {what}" for n, what in numbers if n is not None)
    moved = f"{moved} moved by load" if moved else "what was moved by load is not known"
    parts.append(Text(f"  rebalance  {rebalance['mode']}, {moved}{uneven}"))
    if capacity["flows"] and status["flows"] > 0.35 * capacity["flows"]:
        parts.append(Text("  warning    SNAT ports run short: add SNAT addresses or backends", style="yellow"))
    if shown := status.get("autoscaling"):
        parts.append(Text(f"  autoscaler {shown['decision']}"))
    if seen := status.get("flowTable"):
        state = "settled" if seen.get("settled") else "not settled"
        answer = f"{state} at generation {seen.get('observedGeneration', 0)} of {seen['generation']}"
        parts.append(Text(f"  node       {status['node'] or '-'}, its flow table {answer} {seen.get('message', '')}"))
    parts += [Text(), engines(item), *_while_there_are_two(item), Text()]
    table = _table("LISTENER", "ADDRESS", "BALANCING", "AFFINITY")
    for li in spec["listeners"]:
        table.add_row(
            li["name"], f"{li['protocol']} {li['address']} port {li['port']}", li["balancing"], li["sessionAffinity"]
        )
    parts += [table, Text()]
    table = _table("BACKEND", "WEIGHT", "HEALTHY", "FLOWS", "TOTAL")
    for b in status["backends"]:
        weight = "removed" if b["weight"] is None else str(b["weight"])
        if b.get("share", 1) < 1:
            weight += f" ({b['share']:.0%} by now)"
        table.add_row(
            f"{b['address']} port {b['port']}",
            weight,
            "-" if b["healthy"] is None else str(b["healthy"]).lower(),
            _number(b["flows"]),
            _number(b["flowsTotal"]),
        )
    parts += [table, Text(), *_shedding(status.get("shedding") or ()), *_rebalance(rebalance, 10)]
    parts += [_conditions(status["conditions"]), Text()]
    table = _table("DROPPED BY", "REASON", "DROPS")
    for stage, reasons in (status["drops"] or {}).items():
        for reason, count in reasons.items():
            if count:
                table.add_row(stage, reason, f"{count:,}")
    nothing = (
        "no frame was dropped" if status["drops"] is not None else "what was dropped is not known: no agent answered"
    )
    parts.append(table if table.row_count else Text(nothing))
    parts += [Text(), events(happened[-10:])]
    return Group(*parts)


def _shedding(sheds: Sequence[Json]) -> list[RenderableType]:
    """Listeners that got more packets of strangers than there was time for."""
    table = _table("SHED LISTENER", "KIND", "COME/S", "LET THROUGH/S", "DROPPED")
    for s in sheds:
        come = f"{s['offeredPerSecond']:,}" if s["active"] else "-"
        let = _number(s["allowedPerSecond"]) if s["active"] else "all"
        table.add_row(s["listener"], s["kind"], come, let, f"{s['dropped']:,}")
    return [table, Text()] if table.row_count else []


def autoscaling(item: Json, decided: Json) -> Group:
    """Why a stack has as many engines as it has: each metric's proposal, what cut it, limits, conditions."""
    status, record = decided["autoscaling"], decided["autoscaling"].get("record") or {}
    current, desired = (
        record.get("current", status["currentReplicas"]),
        record.get("desired", status["desiredReplicas"]),
    )
    verdict = (
        f"stays at {counted(current, 'engine')}"
        if current == desired
        else f"from {current} to {counted(desired, 'engine')}"
    )
    if item["spec"].get("paused") or item["spec"]["autoscaling"].get("paused"):
        verdict += ", paused"
    schedule = f", by schedule {status['schedule']}" if status.get("schedule") else ""
    limits = f"{status.get('minReplicas', 1)} to {counted(status['maxReplicas'], 'engine')}{schedule}"
    lines = [("decided", f"{verdict}, by these figures since {status.get('decisionTime') or '-'}"), ("limits", limits)]
    lines.append(("scaled", status.get("lastScaleTime") or "never by the autoscaler"))
    table = _table("METRIC", "IS", "TARGET", "ASKS FOR", "")
    for p in record.get("proposals") or ():
        target, value = p.get("target") or {}, p.get("value") or {}
        note = p.get("error") or ("asks for most" if p["metric"] == record.get("winner") else "")
        if p.get("missing"):
            note = "; ".join(filter(None, [note, f"{counted(p['missing'], 'engine')} without a recent sample"]))
        asks = "-" if p.get("replicas") is None else counted(p["replicas"], "engine")
        kind = next((k for k in ("averageUtilization", "averageValue", "value") if k in target), "")
        table.add_row(p["metric"], _metric(kind, value), _metric(kind, target), asks, note)
    table.columns[-1].no_wrap = False
    cuts = []
    if record.get("stabilizedBy"):
        cuts.append(("window", f"{record['stabilizedBy']}: {counted(record['stabilized'], 'engine')}"))
    if record.get("limitedBy"):
        cuts.append(("limit", f"{record['limitedBy']}: {counted(record['limited'], 'engine')}"))
    if record.get("why"):
        cuts.append(("why", record["why"]))
    parts: list[RenderableType] = [Text(f"Stack {decided['stack']}", style="bold")]
    parts += [Text(f"  {name:10} {text}") for name, text in lines]
    if table.row_count:
        parts += [Text(), table]
    if cuts:
        parts += [Text(), *(Text(f"  {name:10} {text}") for name, text in cuts)]
    if sized := status.get("vertical"):
        parts += [Text(), *_sized(sized)]
    return Group(*parts, Text(), _conditions(decided["conditions"]))


def _sized(sized: Json) -> list[RenderableType]:
    """Why engines have as many cores as they have: what each trigger said, and what stood against it."""
    schedule = f", by schedule {sized['schedule']}" if sized.get("schedule") else ""
    writes = "spec.engine.cores" if sized["decides"] == "Cores" else "spec.engine.cores and spec.replicas"
    lines = [
        ("cores", sized["decision"]),
        ("limits", f"{sized['minCores']} to {counted(sized['maxCores'], 'core')}{schedule}; it writes {writes}"),
        ("scaled", sized.get("lastScaleTime") or "never by the autoscaler"),
    ]
    lines += [(name, sized[name]) for name in ("how", "refused") if sized.get(name)]
    table = _table("TRIGGER", "A CORE HAS", "UP ABOVE", "DOWN BELOW", "CORES IN ALL", "")
    for t in sized.get("triggers") or ():
        cores = "-" if t.get("cores") is None else str(t["cores"])
        note = t.get("note") or ("asks for more" if t.get("fires") else "would do")
        table.add_row(t["trigger"], t.get("value") or "-", t["above"], t["below"], cores, note)
    table.columns[-1].no_wrap = False
    parts: list[RenderableType] = [Text(f"  {name:10} {text}") for name, text in lines]
    return [*parts, Text(), table] if table.row_count else parts


def _metric(kind: str, values: Json) -> str:
    """The member `kind` of a MetricValue, for people."""
    if kind not in values:
        return "-"
    if kind == "averageUtilization":
        return f"{values[kind]} %"
    return f"{float(quantity(values[kind])):,g}"


def _conditions(known: Sequence[Json]) -> Table:
    table = _table("CONDITION", "STATUS", "REASON", "MESSAGE")
    table.columns[-1].no_wrap = False
    for c in known:
        table.add_row(c["type"], c["status"], c["reason"], c["message"])
    return table


def events(items: Sequence[Json]) -> Table:
    """One line an event."""
    table = _table("TIME", "TYPE", "STACK", "REASON", "MESSAGE")
    table.columns[-1].no_wrap = False
    for e in items:
        clock = time.strftime("%H:%M:%S", time.localtime(e["time"]))
        table.add_row(clock, e["type"], e["stack"], e["reason"], e["message"])
    return table


def checks(found: Sequence[Check]) -> list[Text]:
    """One line a check; its end says what to do about what is missing."""
    width = max((len(c.where) for c in found), default=0)
    styles = {"missing": "red", "warning": "yellow", "unknown": "yellow"}
    return [
        Text.assemble(
            (f"{c.result:8}", styles.get(c.result, "")),
            f"{c.where:{width}}  {c.message}",
            (f"; {c.remedy}" if c.remedy else "", "bold"),
        )
        for c in found
    ]


def sizes(ticks: Sequence[SizeTick]) -> Table:
    """A line for each change of the size, and each time that something else stands against one."""
    table = _table("SECONDS", "ENGINES", "CORES", "DECISION")
    table.columns[-1].no_wrap = False
    refused = ""
    for tick in ticks:
        number = tick.size.replicas != tick.before.replicas and tick.decision
        if tick.size != tick.before or tick.refused != refused:
            why = tick.decision if number else "; ".join(filter(None, [tick.sized, tick.how]))
            table.add_row(f"{tick.seconds:g}", str(tick.size.replicas), str(tick.size.cores), why)
        refused = tick.refused
    return table


def decisions(ticks: Sequence[Tick]) -> Table:
    """A line for each decision that was another than the one before."""
    table = _table("SECONDS", "ENGINES", "DECISION")
    table.columns[-1].no_wrap = False
    said = None
    for tick in ticks:
        # Readings differ at every tick; what a person looks for is when the outcome does.
        record = tick.record
        failed = [p.metric for p in record.proposals if p.replicas is None]
        outcome = (tick.replicas, record.stabilized_by, record.limited_by, record.why, failed)
        if outcome != said or tick.replicas != tick.current:
            table.add_row(f"{tick.seconds:g}", str(tick.replicas), str(record))
        said = outcome
    return table
