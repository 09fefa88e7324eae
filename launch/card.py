"""Create reward cards: measure reward models on held-out pairs and sets of responses.

    python launch/card.py RUN/STAGE [RUN/STAGE ...] --pairs JSON --out FILE [--sets JSON]

JSON is a list of data sources as in a recipe. Without --pairs, the held-out pairs of the reward
stage are used. Writes one JSON object that maps model names to cards.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.reward_cards")
