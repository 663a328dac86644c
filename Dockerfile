# One image for operator, agent, engine and CLI; which of them runs is the command's business.
# Works with a read-only root file system and any UID; whoever needs root (the agent) says so in its manifest.
ARG BASE=docker.io/library/debian:bookworm-slim

# ---- builder: what changes most rarely comes first, so that a change of Python code costs seconds --------
FROM ${BASE} AS tools
RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
    clang gcc libbpf-dev libc6-dev libelf-dev linux-libc-dev meson ninja-build pkg-config python3-venv zlib1g-dev \
 && rm -rf /var/lib/apt/lists/*

# Of pyproject.toml only the requirements, so that no other change of it installs them again (hence the fixed date).
FROM tools AS requirements
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
print(*p["project"]["dependencies"], sep="\n", file=open("/run-time", "w")); \
print(*p["build-system"]["requires"], "wheel", sep="\n", file=open("/build-time", "w"))' \
 && touch -d 2000-01-01 /run-time /build-time

# The environment of the image has no pip in it; that of the build is beside it.
FROM tools AS builder
COPY --from=requirements /run-time /build-time /
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/packetstack \
 && /build/bin/pip install -q --no-cache-dir -r /build-time \
 && /build/bin/pip --python /opt/packetstack/bin/python install -q --no-cache-dir -r /run-time

# Compiled parts. setup.py takes this build directory as it is.
WORKDIR /source
COPY meson.build meson_options.txt ./
COPY include include
COPY agent/meson.build agent/
COPY agent/bpf agent/bpf
COPY agent/native agent/native
COPY engine/meson.build engine/
COPY engine/bpf engine/bpf
COPY engine/datapath engine/datapath
COPY cli/meson.build cli/
COPY cli/traffic cli/traffic
RUN PATH=/opt/packetstack/bin:$PATH meson setup -Dtests=false build/meson && meson compile -C build/meson

# Our own packages go to /staging: a layer of their own, small, above the dependencies.
COPY . .
RUN /build/bin/pip wheel -q --no-deps --no-build-isolation -w /build/wheels . \
 && /build/bin/pip --python /opt/packetstack/bin/python install -q --no-deps --no-warn-script-location --root /staging /build/wheels/*.whl \
 && cd /staging/opt/packetstack/bin && ln -s ../lib/python3*/site-packages/packetstack_core/native/packetstack-* .

# ---- the image ------------------------------------------------------------------------------------------
FROM ${BASE}
RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends iptables libbpf1 python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log /var/log/alternatives.log
COPY --from=builder /opt/packetstack /opt/packetstack
COPY --from=builder /staging /
# The root file system may be read-only, output goes to a log, and a user without an entry in /etc/passwd has no home.
ENV PATH=/opt/packetstack/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/ PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="packetstack" \
      org.opencontainers.image.description="An elastic pool of user-space packet engines behind a virtual address: operator, agent, engine and CLI" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
CMD ["packetstack", "--help"]
