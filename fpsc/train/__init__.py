"""Fine-tuning of video diffusion transformers with their attention sparse and in FP8."""
