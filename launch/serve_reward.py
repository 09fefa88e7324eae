"""Serve a reward model over HTTP, for rewards of kind remote on other machines.

    python launch/serve_reward.py RUN/STAGE [--host 127.0.0.1] [--port 8765] [--combine mean]

One process, one scorer; requests that come close together are scored in one batch. It knows no
passwords: listen on other addresses than this machine's own only in a network you trust.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.serve")
