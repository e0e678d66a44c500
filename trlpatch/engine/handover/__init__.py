"""The ways of getting an adapter into an engine. `trlpatch.engine.adapters` chooses one per engine."""
