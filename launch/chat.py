"""Chat with a policy in the terminal, or respond to the lines of standard input.

    python launch/chat.py RUN/STAGE [--temperature 0.7] [--max-new-tokens 256] [--seed 0]

Commands: /reset clears the conversation, /temperature 0.5 sets the temperature, /quit exits.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.chat")
