"""Generation for files of prompts: parts of the input become whole files of output."""
