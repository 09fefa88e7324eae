"""Measure reward models on held-out pairs and sets of answers: their card.

    python launch/card.py RUN/STAGE [RUN/STAGE ...] --pairs JSON --out FILE [--sets JSON]

JSON is a list of data sources as in a recipe. Without --pairs those that the reward stage held out.
Writes one JSON object: name of the model to its card.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.reward_cards")
