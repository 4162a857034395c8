// One conversation: what is sent for a question, and how its answer comes in.

import { answer } from "./api.js";
import { pictureOf } from "./find.js";

/** All turns in OpenAI's form. The thought goes back too, so that the server reuses what it has computed. */
export function messages(turns) {
  return turns.map((turn) => {
    if (turn.role === "assistant") {
      const said = { role: "assistant", content: turn.text };
      return turn.thought ? { ...said, reasoning_content: turn.thought } : said;
    }
    const pictures = turn.pictures.map(({ url, patches }) => {
      return { type: "image_url", image_url: patches ? { url, max_patches: patches } : { url } };
    });
    return { role: "user", content: [...pictures, { type: "text", text: turn.prompt ?? turn.text }] };
  });
}

/** Fields of the request for the last turn. To find something only its picture is sent, and the answer is a box. */
export function asking(turns) {
  const asked = turns.at(-1);
  if (!asked.find) return { messages: messages(turns) };
  const alone = messages([{ ...asked, pictures: [pictureOf(turns)] }]);
  return { messages: alone, response_format: { type: "box" }, temperature: 0 };
}

/** Fields of the request for a mode and a budget in tokens (null: no limit). */
export function thinking(mode, budget) {
  const chosen = mode === "auto" ? {} : { chat_template_kwargs: { enable_thinking: mode === "think" } };
  return budget === null || mode === "nothink" ? chosen : { ...chosen, thinking_budget: budget };
}

/** Let a turn grow until its answer ends; `grown` is called after each piece. Aborting ends it as "cancelled". */
export async function receive(turn, body, signal, grown) {
  let began = null;
  try {
    for await (const event of answer(body, signal)) {
      const choice = event.choices[0];
      if (event.phisight) Object.assign(turn, event.phisight); // stats, notes, grounding
      if (!choice) continue;
      const { reasoning_content: thought, content } = choice.delta;
      if (thought) {
        began ??= performance.now();
        turn.thought += thought;
      }
      if (began !== null && !turn.text) turn.thoughtSeconds = (performance.now() - began) / 1000;
      if (content) turn.text += content;
      if (choice.finish_reason) turn.finish = choice.finish_reason;
      grown();
    }
  } catch (error) {
    if (error.name === "AbortError") turn.finish = "cancelled";
    else {
      turn.finish = "error";
      turn.error = error.message;
      turn.status = error.status;
    }
  }
}
