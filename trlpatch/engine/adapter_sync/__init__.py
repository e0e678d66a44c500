"""The ways of getting an adapter into an engine. `trlpatch.engine.adapter_sync.publish` chooses one per engine."""
