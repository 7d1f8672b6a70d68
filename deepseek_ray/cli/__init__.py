"""One short file per command of deepseek-ray."""
