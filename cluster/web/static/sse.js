// Parses server-sent events from bytes, in pieces of any size. Knows the wire format, not what the events mean.

/** The data of each event of a ReadableStream of bytes, as text. Comments and other fields are skipped. */
export async function* eventsOf(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let text = ""; // received, but not a whole line yet
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      text += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A CR at the end may be the first half of a CRLF.
      const lines = text.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      text = done ? "" : lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return; // an event without its blank line is incomplete and ignored
    }
  } finally {
    reader.cancel().catch(() => {}); // if the page stops reading, the server must stop too
  }
}
