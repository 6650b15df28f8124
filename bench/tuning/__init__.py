"""The experiment of joint fine-tuning: variants, a run of one, its record, tables and pictures."""
