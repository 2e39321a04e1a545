"""A predictor whose embeddings are what a test says they are: pictures hold their number in the first pixel, texts are looked up."""
import numpy as np
from PIL import Image


class StandIn:
    """`images` [N, D] by number, `texts` {text: [D]}."""

    def __init__(self, images, texts):
        self.images, self.texts = np.asarray(images, np.float32), {text: np.asarray(value, np.float32) for text, value in texts.items()}

    def embed_images(self, images):
        return np.stack([self.images[np.asarray(image)[0, 0, 0]] for image in images])

    def embed_texts(self, texts):
        return np.stack([self.texts[text] for text in texts])

    features = embed_images


def picture(number):
    return np.full((9, 7, 3), number, np.uint8)


def png(number):
    import io
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, "png")
    return buffer.getvalue()
