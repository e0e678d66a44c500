"""AsyncGRPOTrainer of TRL 1.6 to 1.16 on Ray engines: its rollout worker and its weight transfer."""
