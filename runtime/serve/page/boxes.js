// A box in an answer, "[x1, y1, x2, y2]" in shares of the sides, over the picture that was asked about.

import { node } from "./dom.js";

const SHARE = "(\\d*\\.?\\d+)";
const BOX = new RegExp(`\\[\\s*${SHARE}\\s*,\\s*${SHARE}\\s*,\\s*${SHARE}\\s*,\\s*${SHARE}\\s*\\]`, "g");
const SVG = "http://www.w3.org/2000/svg";

/** All boxes of a text whose corners lie in the picture; one that is turned round is turned back. */
export function boxesIn(text) {
  return [...text.matchAll(BOX)]
    .map((found) => found.slice(1).map(Number))
    .filter((box) => box.every((share) => share >= 0 && share <= 1))
    .map(([x1, y1, x2, y2]) => [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)]);
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** The picture with the boxes over it, and a dot where `grounding`, if there is one, says to click. */
export function drawn(picture, boxes, grounding = null) {
  const svg = shape("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none" });
  svg.append(...boxes.map(([x1, y1, x2, y2]) => shape("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1 })));
  if (grounding) {
    const [x, y] = [(grounding.point[0] + 0.5) / grounding.width, (grounding.point[1] + 0.5) / grounding.height];
    // A line without length has round ends: a circle would be stretched with the picture.
    svg.append(...["halo", "dot"].map((name) => shape("path", { class: name, d: `M${x} ${y}h0` })));
  }
  const image = node("img", { src: picture.url, alt: `${picture.name} with what was found in it` });
  const figure = node("figure", { className: "found" }, image, svg);
  image.addEventListener("error", () => figure.remove()); // what this browser cannot open
  return figure;
}
