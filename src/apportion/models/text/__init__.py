"""Between tokens and text: templates, token spans, and weights transferred between tokenizers."""
