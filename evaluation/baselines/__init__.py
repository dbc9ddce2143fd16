"""Baselines that need models of their own: VPT's inverse dynamics model, and UniPi's video model. See docs/baselines.md."""
