"""Full weights for engines on Ray actors: vLLM's weight-update session, told apart by what this vLLM has.

`methods` and `updates` are the actor's side, `loading` and `registered` run in workers of vLLM's. `sender`, `fan_out`,
`calls` and `nccl` are the trainer's side; `policy_transfer` says what a policy's weights are and sends them.
"""
