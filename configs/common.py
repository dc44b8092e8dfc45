"""Every setting and its default, said once. The other files in this folder change a few of them.

Override any of them on the command line: `--config.finetune.steps=1000`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults: the published schedule (8k samples, 200 epochs; 10% of the data, 50k steps)."""
    return ConfigDict(
        {
            "seed": 0,
            "stages": (),  # the stages to run, in order; (): all
            # Dtype of matrix products: float32, bfloat16, or auto (bfloat16 on GPU and TPU).
            "precision": "auto",
            "teacher": {
                # A UVA .ckpt, or "embedded": the small PushT policy that ships with the package.
                "checkpoint": "embedded",
                "weights": "ema",  # which weights of the checkpoint: ema or model
            },
            "data": {
                # A diffusion-policy zarr (folder or .zip), or "embedded": the demonstrations that
                # ship with the package, rendered on first use.
                "path": "embedded",
                "max_episodes": 0,  # embedded only: render the first so many (0: all 1,200)
                "cache": "",  # where rendered frames are kept ("": the user's cache folder)
                # "": arrays hold what the policy takes; "umi": UMI's recordings, whose absolute
                # poses become relative to each window's current one, and its actions.
                "layout": "",
                "image_key": "img",
                "wrist_key": "",  # the second camera's array, for policies that see one
                "action_key": "action",
                # Policies that are told their task in language: a file of language latents by task
                # (.npz or .safetensors), or "": the checkpoint's own language tower, with
                # CLIP's vocabulary from this folder ("": the transformers cache).
                "language": "",
                "vocabulary": "",
                "horizon": 32,  # steps of a training window, the current one in the middle
                "pad_after": 7,  # steps a window may reach past the episode's end (upstream: 7)
                "val_ratio": 0.02,  # episodes held out (upstream: 0.02)
                "split_seed": 42,  # of the held-out episodes (upstream: 42)
                # Symmetry of the task used to double the data: "" or "pusht".
                "mirror": "",
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: all remaining devices
            "distributed": {  # several hosts; TPU pods and SLURM are found by themselves
                "enabled": False,
                "coordinator_address": "",
                "num_processes": 0,
                "process_id": -1,
            },
            "head": {
                # "condition": cross-attention builds each action step's condition, once per
                # observation. "residual": it works on the noisy action tokens, at every step.
                "cross_attention": "condition",
                # "video+aggregate": the teacher's aggregator stays and its tokens join the memory
                # (the safest graft); "video": the cross-attention has to learn the aggregation.
                "memory": "video+aggregate",
                # "conv": the aggregator's first convolution, pooled to 4x4 a frame; or "linear".
                "adapter": "conv",
                "num_heads": 8,  # of the cross-attention
                "self_attn_heads": 8,
                "cross_mlp_ratio": 2,  # hidden width of the cross-attention's own feed-forward
                "mlp_ratio": 4,  # hidden width of the MLP operators over the head's width
                "depth": 0,  # blocks (0: as many as the teacher's head has)
                # "preserve": MLP operators start as exact copies of the teacher's blocks, widened,
                # with the self-attention's gate closed. "random": all operators start fresh.
                "start": "preserve",
                # Operators by name, "cross,self,mlp" a block; (): the standard ones in every block.
                "operators": (),
                # Operator folders to load; one left out comes from this run's distillation, or
                # starts fresh (with a line that says so) where that did not run.
                "init_paths": {"cross_attn": "", "self_attn": "", "mlp": ""},
            },
            "capture": {
                "num_samples": 8192,  # windows cached (8k to 16k)
                "held_out": 512,  # further windows, from held-out episodes, to judge by
                # Neighbouring windows of a strip share encoded frames; 1: every window on its own.
                "strip": 1,
                "batch": 16,  # strips a step, over all devices
                "blocks": True,  # store every block's input and residual too
                "dtype": "bfloat16",
                "encode_frames": 0,  # frames the VAE takes at a time (0: all)
            },
            "distill": {
                "operators": ("cross_attn", "self_attn", "mlp"),
                "epochs": 200,
                "lr": 1e-4,
                "batch": 64,
                "warmup": 200,  # steps
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "loss": {"cross_attn": "l1", "self_attn": "l1", "mlp": "l2"},  # l1, l2 or huber
                # Draw new diffusion noise for every batch and recompute the teacher's blocks from
                # the cached tokens (nearly free), or use the stored block activations.
                "fresh_noise": True,
                # Epochs and rate of the self-attention and MLP operators (0: as above).
                "block_epochs": 0,
                "block_lr": 0.0,
                "checkpoint_every": 1000,  # steps between resumable states
                "log_every": 50,
            },
            "finetune": {
                "steps": 50_000,
                "batch": 256,
                "optimizer": "adamw",  # or "muon"
                "lr": 1e-4,
                "warmup": 1000,
                "betas": (0.9, 0.95),
                "weight_decay": 0.02,  # not on biases, norms and other 1-d tensors
                "clip_norm": 1.0,
                "accumulate": 1,  # parts of a batch, one after the other, for less memory
                "data_fraction": 0.1,  # of the training episodes, whole ones, picked by seed
                # Take the windows that capture has cached instead of encoding `data_fraction` of
                # the episodes. Needs everything before the head frozen: freeze=("mar",).
                "reuse_cache": False,
                "freeze_encoder": True,  # VAE and MAR encoder
                "freeze": (),  # further path patterns, such as "mar" or "action_head/memory"
                "unfreeze_at": {},  # {"5000": ("mar/decoder_blocks",)}: frozen until that step
                "dropout": False,  # the transformer's dropout while fine-tuning
                "noise_draws": 1,  # diffusion draws of the head for each window of a batch
                # Of the mean square between the outputs of teacher and graft on the same noisy
                # actions, beside the diffusion loss of the data (0: that alone).
                "teacher_weight": 0.0,
                "use_lora": False,
                "lora_rank": 64,
                "lora_targets": ("mar/decoder_blocks/*/attn/*", "mar/decoder_blocks/*/mlp/*"),
                "gradient_checkpointing": False,
                "ema": {"inv_gamma": 1.0, "power": 0.75, "max_value": 0.9999},
                "steps_per_call": 1,  # steps in one call of the compiled program
                "checkpoint_every": 1000,
                "log_every": 50,
            },
            "pretrain": {  # training a policy: --stage pretrain, which brings vae and encode along
                # Weights to start from: MAR's .pth and a KL-VAE's .ckpt, as they were published, or
                # a UVA checkpoint for either.
                "mar": "",
                "vae": "",
                "from_scratch": False,  # may start from random weights where none are given
                "model": {  # upstream's sizes for PushT
                    "task": "pusht",  # a label that the checkpoint carries
                    "image_size": 256,
                    "vae_width": 128,
                    "vae_multipliers": (1, 1, 2, 2, 4),
                    "width": 768,
                    "depth": 12,  # blocks of the encoder, and of the decoder
                    "heads": 12,
                    "dropout": 0.1,
                    "video_head": (1024, 6),  # width, blocks
                    "action_head": (1024, 6),
                    "n_action_steps": 8,  # of the predicted actions executed
                    # Width of the vectors that tell the task in language (CLIP's: 512; 0: none);
                    # they come from config.data.language.
                    "text_dim": 0,
                    "past_actions": False,  # the past actions are an input too
                    # Arrays of the robot's state that are an input, joined in this order.
                    "states": (),
                    "predict_states": True,  # their future is predicted while training
                    "wrist": False,  # a second camera (data.wrist_key), seen and predicted
                },
                "vae_training": {
                    "steps": 0,  # 0: the VAE stays as it was given
                    "batch": 48,
                    "optimizer": "adamw",
                    "lr": 8e-4,
                    "warmup": 100,
                    "betas": (0.9, 0.95),
                    "weight_decay": 0.01,
                    "clip_norm": 1.0,
                    "accumulate": 1,
                    "ema": {"inv_gamma": 1.0, "power": 0.75, "max_value": 0.999},
                    "frames": 40_000,  # random frames that it trains on
                    "kl_weight": 2e-6,
                    "edge_weight": 0.5,  # of differences between neighbouring pixels
                    "focus": 40.0,  # what rare pixels may count over the background
                    "readout_weight": 1.0,
                    "decode_every": 3,  # of the frames that are read out, one in 3 is decoded
                    # Frames are drawn with odds of their rarity to this power (0: alike).
                    "rarity": 0.0,
                    # Further steps of the decoder alone, every frame decoded; with steps=0 they
                    # are the only ones.
                    "decoder_steps": 0,
                    "decoder_rarity": 0.0,  # as rarity, in these
                    "steps_per_call": 1,
                    "checkpoint_every": 500,
                    "log_every": 20,
                },
                # An array of the data that is read out while training, as a further loss ("": none)
                # and its columns that are angles in radians.
                "readout": "",
                "readout_angles": (),
                "readout_weight": 1.0,  # falls to a tenth of it
                # Upstream's augmentation, on views that are encoded once: each takes as much time
                # and room as the plain frames do.
                "augment": {
                    "views": 0,  # augmented copies of every episode beside the plain one
                    "crop": 0.95,  # side of the random crop, in half of them
                    "blur": 2.0,  # largest deviation of the blur, in pixels, in half of them
                },
                # Random spacing of the past frames, one choice a batch (upstream's name).
                "different_history_freq": False,
                # Task modes with their shares of the batches, {}: upstream's five, uniformly.
                "modes": {},
                "video_steps": 0,  # first phase: so many steps of video_model alone
                "noise_draws": 4,  # of the heads for each window; upstream: 1
                # How float32 matrices are multiplied, in JAX's words: "default", or "bfloat16",
                # which rounds linear layers' factors and sums in float32: faster on newer CPUs.
                "matmul_precision": "default",
                # 0: the policy of pretrain.mar stays, and its decoder alone trains on.
                "steps": 100_000,
                "batch": 64,
                "optimizer": "adamw",  # upstream's; "muon": of blocks' matrices, AdamW of the rest
                "lr": 1e-4,
                "warmup": 1000,
                "betas": (0.9, 0.95),
                "weight_decay": 0.02,
                "clip_norm": 1.0,
                "accumulate": 1,
                "gradient_checkpointing": False,
                "ema": {"inv_gamma": 1.0, "power": 0.75, "max_value": 0.9999},
                "steps_per_call": 4,  # steps in one call of the compiled program
                "checkpoint_every": 1000,
                "log_every": 50,
                "judge_windows": 512,  # held-out windows that losses are judged by
                "score": {  # rollouts in gym-pusht while training, on seeds that no test uses
                    "every": 0,  # steps; a multiple of checkpoint_every (0: none)
                    "num_seeds": 50,
                    "start_seed": 300_000,
                    "max_steps": 300,
                    "sampling_steps": "10",
                    "noise_seed": 0,
                },
                "memory_gb": 4.0,  # latents stay in memory if they fit, else on the disk
                "save_dtype": "float32",  # or bfloat16: the policy rounded, its file half as large
            },
            "evaluate": {
                # Rollouts in gym-pusht: "pusht", "pusht_multitask" (a goal of its own for every
                # seed), or "": none.
                "simulator": "pusht",
                "windows": 256,  # held-out windows for action error, accuracy and mAP (0: none)
                "draws": 4,  # samples of each
                "num_seeds": 50,  # test seeds (upstream: 50 from 100000)
                "start_seed": 100_000,
                "max_steps": 300,
                "sampling_steps": "",  # diffusion steps of the action head ("": the policy's own)
                "noise_seed": 0,  # the same noise for every policy
                "videos": 4,  # seeds recorded
                "workers": 0,  # simulator processes (0: one a core)
            },
            "export": {"filename": "grafted.ckpt"},
            "wandb": {"project": "", "name": ""},
        }
    )
