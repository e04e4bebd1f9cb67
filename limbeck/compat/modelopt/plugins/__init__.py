"""Of ModelOpt's plug-ins, that for transformers' Trainer: `limbeck.compat.modelopt.plugins.huggingface`."""
