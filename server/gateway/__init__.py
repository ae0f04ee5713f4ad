"""The process that talks HTTP: tokenizing, streaming, the engine's client; never imports torch."""
