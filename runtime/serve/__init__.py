"""The OpenAI-compatible server: one model, one engine thread, a fair queue in front.

request -> guard.py (Host, Origin, key) -> body.py -> requests.py, messages.py (what is asked) -> pictures.py (pixels)
        -> engine.py (queue, answer) -> reply.py (JSON, or events as they come)
"""
