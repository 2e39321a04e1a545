"""Between a tower and a language model: modules that bring features of any number to a fixed number of tokens."""
