"""FP16 graphs: one mixed graph for every FP16 backend, and which of its nodes keep float32, by rule and as measured."""
