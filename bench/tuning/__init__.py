"""The experiment of joint fine-tuning: its variants, a run of one, its record, table and pictures."""
