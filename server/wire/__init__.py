"""The messages between gateway and engine, and the frames that carry them over a unix socket."""
