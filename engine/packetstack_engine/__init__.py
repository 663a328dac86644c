"""The container's side: the supervisor beside the datapath."""
