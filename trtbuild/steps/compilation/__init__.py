"""`compile`, `export`, `clean`: a trained model, or a bundle, becomes a bundle or ONNX files.

Does: exports, cleans, builds engines, compares, makes goldens. Takes: a CompileConfig. Gives: a bundle.
May touch: the model (read), the bundle that it writes.
"""
