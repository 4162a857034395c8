// Finding something in one picture: while a picture is aimed at, the composer asks what is to be found in it.

import { byId } from "./dom.js";

export class Finder {
  /** { picture, at }: `at` is [turn, picture] where it stands in the conversation, null for one that is new. */
  target = null;
  #aimed;

  /** `aimed` is called with the picture that is aimed at, null at the end. */
  constructor(aimed) {
    this.#aimed = aimed;
  }

  begin(target) {
    this.target = target;
    this.#show();
    byId("question").focus();
  }

  end() {
    this.target = null;
    this.#show();
  }

  #show() {
    const picture = this.target?.picture ?? null;
    this.#aimed(picture);
    byId("finding").hidden = !picture;
    byId("finding-name").textContent = picture?.name ?? "";
    byId("question").placeholder = picture ? "What is to be found? Such as: click the Save button" : "Ask a question";
    byId("send").textContent = picture ? "Find" : "Send";
  }
}

/** The question's turn, with the prompt that the model was trained on; `prompt` has {} for what is to be found. */
export function findTurn(turns, text, { picture, at }, prompt) {
  const find = at ?? [turns.length, 0];
  return { role: "user", text, prompt: prompt.split("{}").join(text), find, pictures: at ? [] : [picture] };
}

/** The picture that boxes in the answer to the last question lie in; null where none or several may be meant. */
export function pictureOf(turns) {
  const asked = turns.filter((turn) => turn.role === "user");
  const found = asked.at(-1)?.find;
  if (found) return turns[found[0]].pictures[found[1]];
  const pictures = asked.findLast((turn) => turn.pictures.length)?.pictures ?? [];
  return pictures.length === 1 ? pictures[0] : null;
}
