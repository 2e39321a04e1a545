"""The transformer of language models, and what is made of it: decoders, encoder-decoders, BERT."""
