"""How much a stack may have. The models, the CustomResourceDefinitions and the counters of load use the same numbers."""

MAX_NAME = 52
"""Longest name of a stack: names derived from it must fit a DNS label of 63 characters."""
MIN_BUCKETS, MAX_BUCKETS = 256, 8192
MAX_CORES = 32
MAX_METRICS = 32
"""Metrics of an autoscaler: each is read at each decision."""
MAX_SCHEDULES = 32
"""Schedules of an autoscaler: each is looked up at each decision."""
MAX_TRIGGERS = 32
"""Triggers of an autoscaler of cores."""
MAX_POLICIES = 32
"""Policies of one direction of an autoscaler."""
MAX_QUEUES = 64
MAX_REPLICAS = 1000
MAX_LISTENERS = 256
MAX_BACKENDS = 4096
MAX_SNAT_ADDRESSES = 1024
MAX_ALLOWED_SOURCES = 64
MAX_FLOWS_PER_BUCKET = 60_000
"""A shard links its entries by 16-bit indexes."""
