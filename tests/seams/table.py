"""What trlpatch asks of vLLM by name, beside what it imports: a row per class or module, a word per name.

    discard                     the name is there
    discard(self, tags)         and takes these as its first parameters, in this order
    generate(*, lora_request)   and takes these by keyword, whatever stands before
    discard>=0.28               in these releases; in others it may be there or not

A range begins with the oldest release of 0.10.2, 0.11.2, 0.15.1, 0.17.1, 0.23, 0.28 and newer that was seen to have
the name, or with the one that the comment beside its use gives.

trlpatch asks with `getattr` for what newer and older releases do not have, and does less without it: where a name has
moved, an engine copies or stays awake, and there is no error. `python -m tests.seams` says it before.
"""

from __future__ import annotations

MEMBERS: dict[str, str] = {
    # engine: the LLM and what is behind it
    "vllm.entrypoints.llm.LLM": """generate(*, prompts, sampling_params, use_tqdm, lora_request) chat(*, lora_request)
        llm_engine sleep(*, level) wake_up(*, tags) collective_rpc(self, method) reset_prefix_cache get_tokenizer
        release_kv_cache_memory>=0.31""",
    "vllm.v1.engine.llm_engine.LLMEngine": """add_request(self, request_id, prompt, params, arrival_time, lora_request)
        sleep(self, level) wake_up(self, tags) add_lora(self, lora_request) remove_lora(self, lora_id) list_loras
        collective_rpc(self, method) has_unfinished_requests abort_request vllm_config engine_core model_executor
        reset_mm_cache reset_encoder_cache>=0.17""",
    "vllm.v1.engine.core_client.InprocClient": "engine_core get_output _finalizer>=0.31",
    "vllm.v1.engine.core.EngineCore": "batch_queue model_executor scheduler structured_output_manager shutdown",
    "vllm.v1.structured_output.StructuredOutputManager": "clear_backend",
    "vllm.v1.executor.abstract.Executor": "sleeping_tags is_sleeping wake_up(self, tags) discard(self, tags)>=0.31",
    "vllm.v1.executor.uniproc_executor.UniProcExecutor": "driver_worker>=0.11 shutdown>=0.11",
    "vllm.v1.executor.uniproc_executor.ExecutorWithExternalLauncher": "driver_worker>=0.11",
    "vllm.v1.worker.worker_base.WorkerBase": "model_runner>=0.13 get_model>=0.13",
    "vllm.v1.worker.gpu_worker.Worker": "sleep(self, level) wake_up(self, tags) model_runner add_lora",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "get_model lora_manager model",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": "get_model>=0.23 lora_manager>=0.23 model>=0.23",
    # LoRA: registry, adapters, layers
    "vllm.lora.worker_manager.WorkerLoRAManager": "_adapter_manager lora_config list_adapters _lora_model_cls>=0.13",
    "vllm.lora.worker_manager.LRUCacheWorkerLoRAManager": "add_adapter(self, lora_request) _adapter_manager",
    "vllm.lora.model_manager.LRUCacheLoRAModelManager": """model>=0.13 modules>=0.13 packed_modules>=0.13
        capacity>=0.13 lora_index_to_id>=0.13 _last_mapping>=0.13 get_adapter(self, adapter_id)>=0.13
        add_adapter(self)>=0.13 activate_adapter(self)>=0.13 remove_adapter(self, adapter_id)>=0.13
        remove_oldest_adapter>=0.13 __len__>=0.13""",
    "vllm.lora.lora_model.LoRAModel": """from_lora_tensors(*, lora_model_id, tensors, peft_helper, device, dtype,
        weights_mapper)>=0.13 id>=0.13 loras>=0.13 get_lora(self, module_name)>=0.13""",
    "vllm.lora.peft_helper.PEFTHelper": "from_dict(cls, config_dict) validate_legal(self, lora_config)",
    "vllm.lora.lora_weights.LoRALayerWeights": "lora_a>=0.11 lora_b>=0.11 input_dim>=0.11 output_dim>=0.11",
    "vllm.lora.request.LoRARequest": "lora_name lora_int_id lora_path",
    "vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA": """lora_a_stacked lora_b_stacked base_layer output_slices
        n_slices create_lora_weights(self, max_loras, lora_config, model_config) apply(self, x, bias) lora_config
        tp_size>=0.13""",
    **{
        f"vllm.lora.layers.{name}": "can_replace_layer(*, source_layer) lora_a_stacked lora_b_stacked output_slices "
        "create_lora_weights(self, max_loras, lora_config, model_config) apply(self, x, bias)"
        for name in (
            "ColumnParallelLinearWithLoRA",
            "MergedColumnParallelLinearWithLoRA",
            "MergedQKVParallelLinearWithLoRA",
            "RowParallelLinearWithLoRA",
        )
    },
    "vllm.lora.layers.BaseLayerWithLoRA": "can_replace_layer(*, source_layer) punica_wrapper load_weights>=0.28",
    "vllm.lora.layers.FusedMoEWithLoRA": "w13_lora_a_stacked>=0.13",
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase": "_token_lora_indices",
    "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU": "token_mapping_meta",
    "vllm.lora.ops.triton_ops.lora_kernel_metadata.LoRAKernelMeta": """token_lora_mapping active_lora_ids
        no_lora_flag_cpu""",
    "vllm.lora.utils": "_all_lora_classes from_layer",
    # layers and loaders of models
    "vllm.model_executor.layers.linear.UnquantizedLinearMethod": """process_weights_after_loading(self, layer)
        create_weights(self, layer, input_size_per_partition, output_partition_sizes)""",
    "vllm.model_executor.layers.linear.ColumnParallelLinear": "forward output_partition_sizes tp_size>=0.11",
    "vllm.model_executor.layers.linear.MergedColumnParallelLinear": "output_sizes",
    "vllm.model_executor.layers.linear.QKVParallelLinear": "output_sizes",
    "vllm.model_executor.layers.linear.RowParallelLinear": "forward tp_size>=0.11",
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding": "org_vocab_size",
    "vllm.model_executor.layers.vocab_parallel_embedding": "UnquantizedEmbeddingMethod",
    "vllm.model_executor.models.registry": "_run_in_subprocess ModelRegistry",
    "vllm.model_executor.models.interfaces": "supports_lora",
    "vllm.model_executor.models.utils.WeightsMapper": """apply_list(self, values) get_unstacked_mapper>=0.25,<0.29
        get_rename_mapper>=0.29""",
    "vllm.model_executor.models.qwen2.Qwen2ForCausalLM": "packed_modules_mapping load_weights(self, weights)",
    "vllm.model_executor.model_loader.reload": """initialize_layerwise_reload(model)>=0.20
        finalize_layerwise_reload>=0.20""",
    # memory
    "vllm.device_allocator": "DEFERRABLE_TAGS>=0.32",
    "vllm.device_allocator.cumem": "create_and_map unmap_and_release",
    "vllm.device_allocator.cumem.AllocationData": "handle tag is_asleep>=0.25.1",
    "vllm.device_allocator.cumem.CuMemAllocator": """instance pointer_to_data allocator_and_pools get_current_usage
        discard(self, tags)>=0.28 release_pools>=0.24""",
    # process groups and the environment
    "vllm.distributed.parallel_state": """_WORLD destroy_model_parallel destroy_distributed_environment get_tp_group
        GroupCoordinator""",
    "vllm.distributed.parallel_state.GroupCoordinator": "destroy cpu_group",
    "vllm.envs": "disable_envs_cache>=0.13 environment_variables",
    # configuration
    "vllm.engine.arg_utils.EngineArgs": """enable_lora max_lora_rank max_loras max_cpu_loras seed enable_sleep_mode
        logprobs_mode>=0.10 additional_config compilation_config distributed_executor_backend enforce_eager
        worker_extension_cls fully_sharded_loras lora_dtype max_num_seqs max_model_len gpu_memory_utilization
        enable_prefix_caching tensor_parallel_size""",
    "vllm.config.VllmConfig": "model_config lora_config parallel_config cache_config quant_config compilation_config",
    "vllm.config.ModelConfig": """enable_sleep_mode max_model_len get_vocab_size quantization dtype multimodal_config
        logprobs_mode>=0.10 model_impl""",
    "vllm.config.LoRAConfig": "max_lora_rank lora_dtype fully_sharded_loras enable_tower_connector_lora>=0.15",
    "vllm.config.ParallelConfig": "tensor_parallel_size pipeline_parallel_size worker_extension_cls",
    "vllm.config.CacheConfig": "block_size cache_dtype gpu_memory_utilization enable_prefix_caching",
    "vllm.config.offload.OffloadConfig": "uva>=0.18 prefetch>=0.18",
    "vllm.config.compilation.CompilationConfig": """cudagraph_capture_sizes cudagraph_specialize_lora>=0.11
        max_cudagraph_capture_size>=0.13""",
}

IMPORTS: dict[str, str] = {
    "vllm.utils.network_utils.get_open_port": ">=0.11.1",
    "vllm.distributed.weight_transfer": ">=0.23",
    "vllm.config.WeightTransferConfig": ">=0.17",
    "vllm.lora.lora_model.LoRAModel": ">=0.13",
    "vllm.lora.models.LoRAModel": "<0.13",
    "vllm.config.lora.MaxLoRARanks": ">=0.11.1",
    "vllm.sampling_params.StructuredOutputsParams": ">=0.11",
    "vllm.model_executor.model_loader.reload": ">=0.20",
    "vllm.model_executor.model_loader.reload.initialize_layerwise_reload": ">=0.20",
    "vllm.model_executor.model_loader.reload.finalize_layerwise_reload": ">=0.20",
    "vllm.distributed.weight_transfer.nccl_engine.NCCLTrainerSendWeightsArgs": ">=0.17,<0.28",
    "vllm.distributed.weight_transfer.nccl_engine.NCCLTrainerInitInfo": ">=0.28",
    "vllm.distributed.weight_transfer.WeightTransferTrainerFactory": ">=0.28",
    "vllm.distributed.weight_transfer.base.ParamMeta": ">=0.28",
}
"""In which releases what trlpatch imports is there, a name or all below it; what is not here: in every one."""

BY_KEYWORD = (("vllm.lora.utils", "from_layer", "can_replace_layer"),)
"""Functions of vLLM's (module, name) that call a method of ours, the third, and must pass everything by keyword."""

VARIABLES: dict[str, str] = {
    "VLLM_USE_V1": "<0.11.1",
    "VLLM_ATTENTION_BACKEND": "<0.14",
    "VLLM_LORA_ENABLE_DUAL_STREAM": ">=0.23",
    "VLLM_BATCH_INVARIANT": ">=0.23",
}
"""In which releases an environment variable is read that trlpatch asks for; those that are not here: in every one."""
