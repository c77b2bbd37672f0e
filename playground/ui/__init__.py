"""The page. It knows gradio, the engine's events and the inspector's data; never torch, triton or kernels."""
