"""The packet filter of legacy iptables (x_tables), which nf_tables does not show: read and changed by its own programs.

`iptables` on most hosts writes to nf_tables; there the agent reads netlink and needs no program.
"""

import shlex
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from packetstack_agent.errors import AgentError
from packetstack_core.firewalls import (
    COMMENT,
    ESTABLISHED,
    FORWARD,
    INVALID,
    NEW,
    RELATED,
    UNTRACKED,
    Chain,
    Change,
    Expression,
    Rule,
)

FAMILIES = {"ip": ("iptables", "ip_tables_names"), "ip6": ("ip6tables", "ip6_tables_names")}
_STATES = {"INVALID": INVALID, "ESTABLISHED": ESTABLISHED, "RELATED": RELATED, "NEW": NEW, "UNTRACKED": UNTRACKED}
_LOCK_SECONDS = 5
"""How long to wait for whoever is changing the rules."""
_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "ipv6-icmp": 58, "sctp": 132}
_VERDICTS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "reject", "RETURN": "return", "NFQUEUE": "queue"}
_BUILT_IN = {"LOG", "NFLOG", "MARK", "CONNMARK", "TCPMSS", "AUDIT", "DSCP", "TTL", "HL", "CLASSIFY", "SECMARK", "CT"}
TABLE = "filter (legacy)"


def in_use(family: str) -> bool:
    """Whether this namespace has a filter table of legacy iptables."""
    try:
        return "filter" in Path(f"/proc/thread-self/net/{FAMILIES[family][1]}").read_text().split()
    except OSError:
        return False


def _program(family: str, what: str) -> str:
    """Path of iptables-save or iptables-restore of the legacy kind; AgentError if there is none."""
    name = FAMILIES[family][0]
    if found := shutil.which(f"{name}-legacy-{what}"):
        return found
    found = shutil.which(f"{name}-{what}")  # of before there were two kinds
    if found and "nf_tables" not in _run([found, "--version"]):
        return found
    raise AgentError(f"{name}-legacy-{what}: is not installed (Debian package iptables)")


def _run(command: Sequence[str], stdin: str = "") -> str:
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise AgentError(f"{command[0]}: {e}") from None
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        raise AgentError(f"{Path(command[0]).name}: {said[-1]}")
    return done.stdout


def chains(family: str) -> dict[str, Chain]:
    """The chains of the filter table by name, FORWARD among them. AgentError if they cannot be read."""
    return parse(family, _run([_program(family, "save"), "-t", "filter"]))


def parse(family: str, saved: str) -> dict[str, Chain]:
    """Chains out of what `iptables-save` prints."""
    rules: dict[str, list[Rule]] = {}
    policies: dict[str, str] = {}
    for line in saved.splitlines():
        if line.startswith(":"):
            name, policy = line[1:].split()[:2]
            policies[name], rules[name] = policy, []
        elif line.startswith("-A "):
            words = shlex.split(line)
            rules[words[1]].append(_rule(len(rules[words[1]]) + 1, words[2:], policies.keys()))
    return {
        name: Chain(
            family, TABLE, name, FORWARD if name == "FORWARD" else "",
            policy="drop" if policies[name] == "DROP" else "accept", rules=tuple(found),
        )
        for name, found in rules.items()
    }  # fmt: skip


def _rule(number: int, words: Sequence[str], chains: object) -> Rule:
    found: list[Expression] = []
    comment, inverted, at = "", False, 0
    while at < len(words):
        word, value = words[at], words[at + 1] if at + 1 < len(words) else ""
        at += 2
        match word:
            case "!":
                inverted, at = True, at - 1
                continue
            case "-i" | "-o":
                data = value[:-1].encode() if value.endswith("+") else value.encode() + b"\0"
                found += [
                    Expression("meta", key=6 if word == "-i" else 7, register=1),
                    Expression("cmp", key=int(inverted), register=1, data=data),
                ]
            case "-p" if value in _PROTOCOLS:
                found += [
                    Expression("meta", key=16, register=1),
                    Expression("cmp", key=int(inverted), register=1, data=bytes([_PROTOCOLS[value]])),
                ]
            case "-m" | "--nfacct-name":
                pass  # what it asks for follows; the account of a rule asks for nothing
            case "--ctstate" | "--state" if not inverted and set(value.split(",")) <= set(_STATES):
                bits = sum(_STATES[s] for s in value.split(","))
                found.append(Expression("match", text="state", data=struct.pack("=I", bits)))
            case "--comment":
                comment = value
            case "-j" | "-g":
                if value in _VERDICTS:
                    found.append(Expression("immediate", text=_VERDICTS[value]))
                elif value not in _BUILT_IN:
                    found.append(Expression("immediate", text="jump" if word == "-j" else "goto", chain=value))
                break  # the rest is the target's
            case _:
                found.append(Expression(word))
                at -= 1
        inverted = False
    return Rule(number, tuple(found), comment)


def change(chain: Chain, wanted: Change, pair: str) -> None:
    """Carry out a change of FORWARD in one step. AgentError if that cannot be."""
    ours = f"-m comment --comment {COMMENT} -j ACCEPT"
    lines = [f"-D {chain.name} {number}" for number in sorted(wanted.remove, reverse=True)]
    if wanted.insert:
        ways = (f"-o {pair}", f"-i {pair}")
        if wanted.before is None:
            lines += [f"-A {chain.name} {way} {ours}" for way in ways]
        else:
            place = wanted.before - sum(number < wanted.before for number in wanted.remove)
            lines += [f"-I {chain.name} {place} {way} {ours}" for way in reversed(ways)]
    script = "\n".join(["*filter", *lines, "COMMIT", ""])
    _run([_program(chain.family, "restore"), "--noflush", "--wait", str(_LOCK_SECONDS)], script)
