"""Serve a reward model over HTTP, for rewards of kind remote on other machines.

    python launch/serve_reward.py RUN/STAGE [--host 127.0.0.1] [--port 8765] [--combine mean]

One process runs one scorer and batches concurrent requests. There is no authentication: use an
address other than 127.0.0.1 only in a network you trust.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.serve")
