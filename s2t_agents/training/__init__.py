"""From prompts to calibrated selectors and the table that compares them: ``s2t collect | train | calibrate | eval``."""
